"""megatron-core's own attention, which knows no packed sequences; verl packs by default.

Where TransformerEngine is missing, every attention layer is a ``DotProductAttention``.  What is read of Megatron's
objects is the same from megatron-core 0.12 to 0.16; what one of them lacks is an error and never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Have packed sequences attended to by whoever answers, with TransformerEngine's meaning of Megatron's objects."""
    kind = attn_mask_type or _of(core, "attn_mask_type")
    if packed_seq_params is None:
        mask = seen_mask(kind, attention_mask)
        return original(query, key, value, mask, attn_mask_type, attention_bias, **more)
    if packed_seq_params.qkv_format == "thd":
        sinks = None if getattr(core.config, "softmax_type", "vanilla") == "vanilla" else _of(core, "softmax_offset")
        layer = Layer(
            _form(core, kind.name in CAUSAL),
            _of(core, "attention_dropout").p if core.training else 0.0,
            _of(core.config, "context_parallel_size"),
            sinks,
        )
        answer = attend_packed(layer, query, key, value, kind, attention_bias, packed_seq_params, more)
        if answer is not None:
            return answer
    return original(
        query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params=packed_seq_params, **more
    )


def seen_mask(kind: Any, mask: Any) -> Any:
    """Return the mask that a layer is to see; None for verl's own of a padded batch under a causal mask.

    That has two dimensions, where Megatron's and TransformerEngine's have four and mean the opposite.  It tells tokens
    from padding at the end, which a causal mask hides; TransformerEngine does not look at it either.
    """
    return None if mask is not None and kind.name in CAUSAL and mask.dim() == 2 else mask


@dataclass(frozen=True)
class Layer:
    """How a layer attends: its form, the part of the weights that is dropped, over how many ranks a sequence lies."""

    form: Form
    dropout: float
    ranks: int
    sinks: Any = None
    whose: str = "Without TransformerEngine"


def attend_packed(
    layer: Layer, query: Any, key: Any, value: Any, kind: Any, bias: Any, params: Any, more: dict[str, Any]
) -> Any:
    """Return what each token of packed sequences sees, (tokens, [1,] heads * size); None if nobody answers.

    Raises:
        MegatronError: the layer asks for what the overlay's attention does not compute.
    """
    ranks = getattr(params, "local_cp_size", None) or layer.ranks
    more = {name: given for name, given in more.items() if given is not None}
    if kind.name not in CAUSAL | OPEN:
        _refuse(f"a mask of type {kind.name}", f"one of {', '.join(sorted(CAUSAL | OPEN))} is expected", layer.whose)
    if bias is not None:
        _refuse("an attention bias", "leave it out", layer.whose)
    if ranks > 1:
        _refuse(f"context_parallel_size={ranks}", "set context_parallel_size=1", layer.whose)
    if layer.dropout:
        found = f"attention_dropout={layer.dropout} in training"
        _refuse(found, "set override_transformer_config.attention_dropout=0.0", layer.whose)
    if more:
        found = f"{', '.join(more)}, which only a newer megatron-core has"
        _refuse(found, "install megatron-core 0.12 to 0.16", layer.whose)
    q, k, v = (tensor.squeeze(1) if tensor.dim() == 4 else tensor for tensor in (query, key, value))
    if any(tensor.dim() != 3 for tensor in (q, k, v)):
        _refuse(f"a query of shape {tuple(query.shape)}", "(tokens, heads, size) is expected", layer.whose)
    answer = packed_attention.ask(q, k, v, _sequences(params, kind.name in CAUSAL), layer.form, layer.sinks)
    return None if answer is None else answer.reshape(*query.shape[:-2], -1)


def _refuse(found: str, instead: str, whose: str = Layer.whose) -> NoReturn:
    raise MegatronError(
        f"attention over packed sequences was asked for {found}. {whose} that cannot be computed: "
        f"{instead}, or install NVIDIA's TransformerEngine"
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
