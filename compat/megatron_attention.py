"""megatron-core's own attention, which knows no packed sequences; verl packs by default.

Where TransformerEngine is missing, every attention layer is a ``DotProductAttention``.  What is read of Megatron's
objects is the same from megatron-core 0.12 to 0.16; what one of them lacks is an error and never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from verl_fl_overlay.errors import MegatronError
from verl_fl_overlay.events import packed_attention
from verl_fl_overlay.hooks import Call, Hook

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.sequences import Form, Sequences

CAUSAL = {"causal", "padding_causal", "causal_bottom_right"}
OPEN = {"no_mask", "padding"}
"""Megatron's types of mask: a query sees no later key; it sees all of its sequence."""


def _forward(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _attend(wrapped, instance, *args, **kwargs)


def _attend(
    original: Call,
    core: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    attn_mask_type: Any = None,
    attention_bias: Any = None,
    packed_seq_params: Any = None,
    **more: Any,
) -> Any:
    """Have packed sequences attended to by whoever answers, with TransformerEngine's meaning of Megatron's objects.

    TransformerEngine looks at a mask only if its type is padding or arbitrary, and not at all for packed sequences.
    """
    kind = attn_mask_type or _of(core, "attn_mask_type")
    causal = kind.name in CAUSAL
    if packed_seq_params is None:
        # Megatron's own mask has four dimensions; verl's tells tokens from padding at the end, which causal hides.
        if causal and attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = None
        return original(query, key, value, attention_mask, attn_mask_type, attention_bias, **more)
    if packed_seq_params.qkv_format == "thd":
        _refuse_what_is_more(core, kind, attention_bias, packed_seq_params, more)
        q, k, v = (tensor.squeeze(1) if tensor.dim() == 4 else tensor for tensor in (query, key, value))
        if any(tensor.dim() != 3 for tensor in (q, k, v)):
            _refuse(f"a query of shape {tuple(query.shape)}", "(tokens, heads, size) is expected")
        sequences = _sequences(packed_seq_params, causal)
        sinks = None if getattr(core.config, "softmax_type", "vanilla") == "vanilla" else _of(core, "softmax_offset")
        answer = packed_attention.ask(q, k, v, sequences, _form(core, causal), sinks)
        if answer is not None:
            return answer.reshape(*query.shape[:-2], -1)
    return original(
        query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params=packed_seq_params, **more
    )


def _refuse_what_is_more(core: Any, kind: Any, bias: Any, params: Any, more: dict[str, Any]) -> None:
    ranks = getattr(params, "local_cp_size", None) or _of(core.config, "context_parallel_size")
    dropout = _of(core, "attention_dropout").p if core.training else 0.0
    if kind.name not in CAUSAL | OPEN:
        _refuse(f"a mask of type {kind.name}", f"one of {', '.join(sorted(CAUSAL | OPEN))} is expected")
    if bias is not None:
        _refuse("an attention bias", "leave it out")
    if ranks > 1:
        _refuse(f"context_parallel_size={ranks}", "set context_parallel_size=1")
    if dropout:
        _refuse(f"attention_dropout={dropout} in training", "set override_transformer_config.attention_dropout=0.0")
    if more:
        _refuse(f"{', '.join(more)}, which only a newer megatron-core has", "install megatron-core 0.12 to 0.16")


def _refuse(found: str, instead: str) -> NoReturn:
    raise MegatronError(
        f"attention over packed sequences was asked for {found}. Without TransformerEngine that cannot be computed: "
        f"{instead}, or install TransformerEngine"
    )


def _of(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        return _refuse(f"by a megatron-core whose {type(owner).__name__} has no {name}", "install 0.12 to 0.16")


def _sequences(params: Any, causal: bool) -> Sequences:
    """Return where the sequences lie.

    With padding at the end of each, they are taken as if padding were tokens: where a query sees no later key, no
    token sees padding.
    """
    import torch

    from verl_fl_overlay.kernels.sequences import Sequences

    def same(one: Any, other: Any) -> bool:
        return one is other or torch.equal(one, other)  # verl gives one tensor several times; equal waits for the GPU

    q, k = params.cu_seqlens_q, params.cu_seqlens_kv
    if q is None or k is None:
        _refuse("without cu_seqlens_q and cu_seqlens_kv", "they tell where each sequence ends")
    padded_q = q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
    padded_k = k if params.cu_seqlens_kv_padded is None else params.cu_seqlens_kv_padded
    if causal and not (same(q, k) and same(padded_q, padded_k)):
        _refuse("causal, with other lengths of the keys than of the queries", "give both the same cu_seqlens")
    padded = not (same(q, padded_q) and same(k, padded_k))
    if padded and not causal:
        _refuse("not causal, with padding between the sequences, which every token would see", "pack without padding")

    def longest(given: Any, ends: Any) -> int:
        return int(ends.diff().max()) if padded or given is None else int(given)

    return Sequences(
        padded_q.to(torch.int32),
        padded_k.to(torch.int32),
        longest(params.max_seqlen_q, padded_q),
        longest(params.max_seqlen_kv, padded_k),
    )


def _form(core: Any, causal: bool) -> Form:
    """Return how a query of the layer ``core`` sees keys.

    With apply_query_key_layer_scaling Megatron divides the scale by the layer's number, and its softmax multiplies by
    it again.  Its softmax also knows which layers have the window.
    """
    from verl_fl_overlay.kernels.sequences import ANY, Form

    softmax = _of(core, "scale_mask_softmax")
    scale = float(_of(core, "softmax_scale")) * (_of(softmax, "scale") or 1.0)
    window = _of(softmax, "window_size") if _of(core.config, "window_size") else None
    left, right = window or (ANY, ANY)
    return Form(scale, causal, (int(left), int(right)))


def packed_hook() -> Hook:
    """Return the hook on the attention of megatron-core's own layers."""
    return Hook(
        name="attention.megatron",
        module="megatron.core.transformer.dot_product_attention",
        attribute="DotProductAttention.forward",
        wrapper=_forward,
        feature="attention",
        required=False,
        why="verl packs sequences, which Megatron computes with TransformerEngine only; without it the overlay's "
        "attention computes them, and verl's mask of a padded batch is left to the causal one.",
        upstream="https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/"
        "dot_product_attention.py#L147",
        until="megatron-core's DotProductAttention takes packed sequences",
        needs="megatron.core",
    )
