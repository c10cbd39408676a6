"""Where verl assumes that the flash-attn package is installed, on every device except the NPU."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.hooks import Call, Hook
from verl_fl_overlay.packages import flash_attn_imports

FLASH = "flash_attention_2"


def _without_flash_attn(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if flash_attn_imports():
        return wrapped(*args, **kwargs)
    try:
        from verl.utils.npu_flash_attn_utils import index_first_axis, pad_input, rearrange, unpad_input
    except ImportError as error:
        raise OverlayError(
            "flash_attn cannot be imported, and verl's pure-torch padding functions, which take its place, need "
            f"{error.name}: pip install {error.name}"
        ) from error
    return index_first_axis, pad_input, rearrange, unpad_input


def _value_model(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from verl.utils.device import get_device_name

    if flash_attn_imports() or get_device_name() == "npu":  # on an NPU transformers needs no flash-attn
        return wrapped(*args, **kwargs)
    return _load(wrapped, *args, **kwargs)


def _load(load: Call, local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForTokenClassification

    attention = getattr(model_config, "_attn_implementation", None) or FLASH
    try:
        return AutoModelForTokenClassification.from_pretrained(
            pretrained_model_name_or_path=local_path,
            torch_dtype=torch_dtype,
            config=model_config,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    except ValueError:  # transformers has no token classifier of this kind; verl goes on to trl's value head
        return _with(attention, load)(local_path, torch_dtype, model_config, trust_remote_code)


def _with(attention: str, load: Call) -> Call:
    """Return verl's function with ``attention`` where it has flash_attention_2; all else stays the release's own."""
    code = load.__code__
    constants = tuple(attention if constant == FLASH else constant for constant in code.co_consts)
    return FunctionType(code.replace(co_consts=constants), load.__globals__)


def value_model_hook() -> Hook:
    """Return the hook on the loading of models with a value head."""
    return Hook(
        name="attention.value_model",
        module="verl.utils.model",
        attribute="load_valuehead_model",
        wrapper=_value_model,
        feature="attention",
        required=False,
        why="verl loads value models with flash_attention_2 whatever was configured; without that package the "
        "configured attention is taken.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/model.py#L642",
        until="verl passes the configured attn_implementation to the value model",
        relies_on=(
            "verl.utils.device:get_device_name",
            "transformers:AutoModelForTokenClassification",
            "transformers:PretrainedConfig._attn_implementation",
        ),
    )


def padding_hook() -> Hook:
    """Return the hook on the choice of padding functions, which verl 0.7.0 to 0.9.0 need."""
    return Hook(
        name="attention.padding",
        module="verl.utils.attention_utils",
        attribute="_get_attention_functions",
        wrapper=_without_flash_attn,
        feature="attention",
        required=False,
        why="verl imports flash_attn's padding helpers on all but NPUs; without that package its own torch ones serve.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.0/verl/utils/attention_utils.py",
        until="verl 0.9.1, which falls back by itself",
        relies_on=tuple(
            f"verl.utils.npu_flash_attn_utils:{name}"
            for name in ("index_first_axis", "pad_input", "rearrange", "unpad_input")
        ),
    )
