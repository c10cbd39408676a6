"""verl 0.7.0 to 0.9.0 ask flash-attn for padding helpers, on every device but the NPU; here they do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_fl_overlay.attention import flash_attn_imports
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.hooks import Hook


def _without_flash_attn(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
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


def attention_hook() -> Hook:
    """Return the hook on the choice of padding functions."""
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
    )
