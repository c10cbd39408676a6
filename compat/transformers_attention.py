"""Where transformers looks for flash-attn: the check of a model's attention, and the functions that it calls.

verl trains with flash_attention_2 when nothing is said.  Everything around the two functions stays transformers' and
verl's: how sequences are packed and unpacked, and Ulysses' exchange of heads.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.events import packed_attention
from verl_fl_overlay.hooks import Call, Hook
from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences
from verl_fl_overlay.packages import flash_attn_imports

NAME = "flash_attention_2"
FUNCTIONS = "transformers.modeling_flash_attention_utils"
MODELS = "transformers.modeling_utils"
UTILS = "transformers.utils"
UPSTREAM = "https://github.com/huggingface/transformers/blob/v5.10.4/src/transformers"


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (ANY, ANY),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Any = None,
) -> Any:
    """Attend over packed sequences, with the parameters of flash-attn's ``flash_attn_varlen_func``.

    ``s_aux`` is transformers' name for sinks.  From these names transformers sees what may be asked for.

    Raises:
        OverlayError: there is dropout, or the overlay was turned off after the model was built.
    """
    if dropout_p:
        raise OverlayError(
            f"{NAME} without flash-attn has no dropout, and the model asks for {dropout_p}: set attention_dropout=0 in "
            "the model's override_config, or attn_implementation=sdpa together with use_remove_padding=False"
        )
    sequences = Sequences(cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    form = Form(scale, causal, _sides(window_size), softcap)
    attended = packed_attention.ask(q, k, v, sequences, form, s_aux, deterministic)
    if attended is None:
        raise OverlayError(f"verl-fl-overlay is off; a model that was built with its {NAME} cannot run without it")
    return attended


def dense(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Attend over sequences of one length, (batch, tokens, heads, size); options as those of ``varlen``."""
    import torch

    batch, longest_q, longest_k = q.shape[0], q.shape[1], k.shape[1]
    firsts = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
    q, k, v = (part.reshape(-1, *part.shape[2:]) for part in (q, k, v))
    attended = varlen(q, k, v, firsts * longest_q, firsts * longest_k, longest_q, longest_k, **options)
    return attended.unflatten(0, (batch, longest_q))


def _sides(window: tuple[int, int]) -> tuple[int, int]:
    left, right = (side if side >= 0 else ANY for side in window)
    return left, right


def _served() -> bool:
    """Whether flash-attn's functions are the overlay's: it cannot be imported, and no vendor's stand in for it."""
    utils = importlib.import_module(UTILS)
    if utils.is_torch_npu_available() or utils.is_torch_xpu_available():
        return False
    return not (utils.is_flash_attn_2_available() and flash_attn_imports())


def _dispatch(wrapped: Call, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("attn_implementation", args[0] if args else None)
    supports = getattr(model, "_supports_flash_attn", False) or getattr(model, "_supports_flash_attn_2", False)
    if asked != NAME or not supports or not _served():
        return wrapped(*args, **kwargs)
    load = importlib.import_module(FUNCTIONS).lazy_import_flash_attention
    # transformers 4.57 keeps the functions of whatever it loaded first, unless it is told otherwise
    load(NAME, **({"force_import": True} if "force_import" in inspect.signature(load).parameters else {}))
    return NAME


def _functions(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("implementation", args[0] if args else None)
    if asked != NAME or not _served():
        return wrapped(*args, **kwargs)
    own = importlib.import_module(FUNCTIONS)
    with_a_cache = (
        [None] if hasattr(own, "_flash_with_kvcache_fn") else []
    )  # paged generation, which verl has no use for
    return dense, varlen, *with_a_cache, own._pad_input, own._unpad_input


def _available(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _served() or wrapped(*args, **kwargs)


ASKED = tuple(f"{UTILS}:is_{what}_available" for what in ("torch_npu", "torch_xpu", "flash_attn_2"))
"""What each hook asks transformers, to know whether flash-attn's functions are the overlay's."""


def hooks() -> list[Hook]:
    """Return the hooks on transformers, which are the same for every verl."""
    hook = partial(Hook, feature="attention", required=False, until="transformers lets a package give these functions")
    return [
        hook(
            name="attention.dispatch",
            module=MODELS,
            attribute="PreTrainedModel._check_and_adjust_attn_implementation",
            wrapper=_dispatch,
            why="transformers refuses flash_attention_2 without flash-attn, or downloads a kernel; with the overlay "
            "it has functions of its own.",
            upstream=f"{UPSTREAM}/modeling_utils.py#L1878",
            pair="attention.functions",
            relies_on=(
                *ASKED,
                f"{FUNCTIONS}:lazy_import_flash_attention",
                f"{MODELS}:PreTrainedModel._supports_flash_attn",
            ),
        ),
        hook(
            name="attention.functions",
            module=FUNCTIONS,
            attribute="_lazy_imports",
            wrapper=_functions,
            why="transformers takes flash_attention_2's functions from flash-attn here; where that cannot be imported "
            "it gets the overlay's.",
            upstream=f"{UPSTREAM}/modeling_flash_attention_utils.py#L139",
            pair="attention.dispatch",
            relies_on=(*ASKED, f"{FUNCTIONS}:_pad_input", f"{FUNCTIONS}:_unpad_input"),
        ),
        hook(
            name="attention.available",
            module=FUNCTIONS,
            attribute="is_flash_attn_available",
            wrapper=_available,
            why="files of older models import transformers' flash attention only where flash-attn is there; they "
            "import it with the overlay's functions too.",
            upstream=f"{UPSTREAM}/modeling_flash_attention_utils.py#L51",
            relies_on=ASKED,
        ),
    ]
