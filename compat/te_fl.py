"""TransformerEngine-FL under verl's Megatron engine: which implementations ran, and what they get wrong.

Its flagos and reference implementations take the place of NVIDIA's compiled ones.  Their attention knows causal
sequences of one length and no others; where it is asked for more, it leaves out what it does not know and goes on.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from verl_fl_overlay.compat.megatron_attention import CAUSAL, Layer, attend_packed, seen_mask
from verl_fl_overlay.errors import MegatronError
from verl_fl_overlay.events import te_operator_ran
from verl_fl_overlay.hooks import Call, Hook

SOURCE = "https://github.com/flagos-ai/TransformerEngine-FL/blob/main/transformer_engine"
BACKENDS = "transformer_engine.plugin.core.backends"
PYTHON = (f"{BACKENDS}.flagos.", f"{BACKENDS}.reference.")
"""Where the implementations lie that are not a vendor's."""
EVERYTHING = (None, (-1, -1), (-1, 0))
"""Windows of TransformerEngine that leave no earlier key out."""


def _forward(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _attend(wrapped, instance, inspect.signature(wrapped).bind(*args, **kwargs))


def _attend(wrapped: Call, core: Any, given: inspect.BoundArguments) -> Any:
    if not type(core.flash_attention).__module__.startswith(PYTHON):
        return wrapped(*given.args, **given.kwargs)
    asked = dict(given.arguments)
    query, key, value = (asked.pop(name) for name in ("query", "key", "value"))
    mask, kind, bias, params = (
        asked.pop(name, None) for name in ("attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params")
    )
    if params is None:
        given.arguments["attention_mask"] = seen_mask(kind, mask)
    elif params.qkv_format == "thd":
        answer = attend_packed(_layer(core, kind.name in CAUSAL), query, key, value, kind, bias, params, asked)
        if answer is not None:
            return answer
    return wrapped(*given.args, **given.kwargs)


def _layer(core: Any, causal: bool) -> Layer:
    from verl_fl_overlay.kernels.sequences import ANY, Form

    left, right = core.window_size or (ANY, ANY)
    form = Form(float(core.flash_attention.softmax_scale), causal, (int(left), ANY if causal else int(right)))
    return Layer(
        form,
        core.attention_dropout if core.training else 0.0,
        core.config.context_parallel_size,
        None if getattr(core, "softmax_type", "vanilla") == "vanilla" else core.softmax_offset,
        "By TransformerEngine-FL's own implementations",
    )


def _flash(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flagos = type(instance).__module__.startswith(PYTHON[0])
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    asked = given.arguments
    instead = (
        "write TE_FL_PER_OP=get_flash_attention_class=vendor, or set "
        "override_transformer_config.attention_backend=unfused"
    )
    if flagos and asked["query_layer"].requires_grad:
        _refuse_gradient(instead)
    if flagos and hasattr(instance, "_forward_impl"):  # a newer one refuses what it does not know itself
        return wrapped(*args, **kwargs)
    layout = asked.get("qkv_layout", "sbhd").partition("_")[0]
    window = asked.get("window_size")
    wrong = {
        f"a mask of type {asked.get('attn_mask_type')}": asked.get("attn_mask_type", "causal")
        not in ("causal", "no_mask"),
        f"a window of {window}": (tuple(window) if window else None) not in EVERYTHING,
        "slopes of ALiBi": asked.get("alibi_slopes") is not None,
        f"the layout {layout}": layout not in ("sbhd", "sbh3d", "sb3hd"),
    }
    found = [said for said, here in wrong.items() if here]
    if found:
        raise MegatronError(
            f"TransformerEngine-FL's {type(instance).__name__} was asked for {', '.join(found)}, which it leaves out "
            f"or does not know; its numbers would be wrong. To go on, {instead}"
        )
    # All sequences have one length here; with their ends beside it the reference implementation takes them for packed.
    asked.update(cu_seqlens_q=None, cu_seqlens_kv=None)
    if not flagos:  # the reference looks up a layout of one word
        asked["qkv_layout"] = layout
    return wrapped(*given.args, **given.kwargs)


def _refuse_gradient(instead: str) -> None:
    from verl_fl_overlay.flaggems import faults, library

    version = library.installed_version()
    if faults.ATTENTION.holds(library.release(version), ""):
        raise MegatronError(
            f"TransformerEngine-FL's flagos attention has its gradient from flag_gems {version}: {faults.ATTENTION}. "
            f"Install flag_gems {faults.ATTENTION.until} or newer, {instead}"
        )


def _call(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = wrapped(*args, **kwargs)
    te_operator_ran.emit(instance, args[0])
    return result


def _gemm(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute out = B A (+ bias); in the backward pass the bias asks for its gradient, the sum of B over the tokens."""
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    asked = given.arguments
    bias, b = asked["bias"], asked["B"]
    if bias is None or asked["gelu"]:
        return wrapped(*args, **kwargs)
    asked["bias"] = None
    out, bias_grad, *more = wrapped(*given.args, **given.kwargs)
    if asked["grad"]:
        bias_grad = b.reshape(-1, b.shape[-1]).sum(0).to(bias.dtype)
    else:
        out = out.add_(bias)
    return (out, bias_grad, *more)


def _flagos_gemm(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return wrapped(*args, **kwargs)
    except AssertionError:  # before it computes anything: older ones take no bias
        return _gemm(wrapped, instance, args, kwargs)


def _adam(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asked = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    found = ""
    if len(asked["tensor_lists"]) > 4:
        found = "an optimizer with weights in fp32 of its own (use_precision_aware_optimizer), which it rounds"
    elif asked["mode"] != 1 and asked["weight_decay"]:
        found = "weight_decay as an L2 term (decoupled_weight_decay=False), which it does not compute"
    if found:
        raise MegatronError(
            f"TransformerEngine-FL's own Adam was asked for {found}; the steps would be wrong. Leave that "
            "setting at its default, or write TE_FL_PER_OP=multi_tensor_adam=vendor"
        )
    return wrapped(*args, **kwargs)


def hooks() -> list[Hook]:
    """Return what every release needs where TransformerEngine-FL is installed."""
    hook = partial(Hook, feature="te_fl", required=False, needs="transformer_engine")
    return [
        hook(
            name="te_fl.attention",
            module="megatron.core.extensions.transformer_engine",
            attribute="TEDotProductAttention.forward",
            wrapper=_forward,
            why="TransformerEngine-FL's own attention takes no packed sequences, which verl gives by default; the "
            "overlay's computes them. verl's mask of a padded batch is left to the causal one.",
            upstream=f"{SOURCE}/plugin/core/backends/flagos/attention/dot_product_attention/backends.py",
            until="TransformerEngine-FL's flagos and reference attention take packed sequences",
        ),
        hook(
            name="te_fl.call",
            module="transformer_engine.plugin.core.manager",
            attribute="OpManager.call",
            wrapper=_call,
            why="TransformerEngine-FL goes on with another implementation where the first one fails; the overlay "
            "counts which one ran.",
            upstream=f"{SOURCE}/plugin/core/manager.py",
            until="TransformerEngine-FL tells which implementations ran",
        ),
        *(
            hook(
                name=f"te_fl.flash.{kind}",
                module=f"{BACKENDS}.{kind}.{place}",
                attribute=f"{owner}.forward",
                wrapper=_flash,
                why="This attention takes every mask but the causal one for none, and leaves windows out; with an "
                "older FlagGems flagos' gradient is wrong. Only what it computes is let through.",
                upstream=f"{SOURCE}/plugin/core/backends/{kind}/{place.replace('.', '/')}.py",
                until="TransformerEngine-FL's attention computes or refuses all that it is asked for",
            )
            for kind, place, owner in (
                ("flagos", "attention.dot_product_attention.backends", "FlashAttentionFL"),
                ("reference", "flash_attention", "FlashAttentionTorch"),
            )
        ),
        *(
            hook(
                name=f"te_fl.gemm.{kind}",
                module=f"{BACKENDS}.{kind}.impl.gemm",
                attribute=function,
                wrapper=wrapper,
                why="In the backward pass a bias asks for its gradient; the reference adds the bias to the weight's "
                "gradient instead and returns none, and older flagos ones take no bias at all.",
                upstream=f"{SOURCE}/plugin/core/backends/{kind}/impl/gemm.py",
                until="TransformerEngine-FL's products return the gradient of a bias",
            )
            for kind, function, wrapper in (
                ("flagos", "generic_gemm_fl", _flagos_gemm),
                ("reference", "general_gemm_torch", _gemm),
            )
        ),
        *(
            hook(
                name=f"te_fl.adam.{kind}",
                module=f"{BACKENDS}.{kind}.impl.{place}",
                attribute=function,
                wrapper=_adam,
                why="This Adam rounds weights in fp32 to the model's type, and does not know L2; both are refused.",
                upstream=f"{SOURCE}/plugin/core/backends/{kind}/impl/{place}.py",
                until="TransformerEngine-FL's Adam computes or refuses all that it is asked for",
            )
            for kind, place, function in (
                ("flagos", "fused_adam", "multi_tensor_adam_fl"),
                ("reference", "optimizer", "multi_tensor_adam_torch"),
            )
        ),
    ]
