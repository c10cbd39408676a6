"""Attention over packed sequences by torch's own operators: FlashAttention-2 where torch has it, SDPA everywhere.

``flash`` is one launch for all sequences.  ``one_at_a_time`` is a loop over them, so the host waits for their lengths;
it takes everything, and it is what the other two ways are checked against.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from verl_fl_overlay.errors import AttentionInputError
from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_LARGEST = 256
"""Largest head size of torch's FlashAttention; a head size has to be a multiple of 8."""


def flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, form: Form, sinks: None = None) -> Tensor:
    """Attend by the FlashAttention-2 that is part of torch's CUDA and ROCm builds; it has no soft cap and no sinks.

    Shapes and meaning as in ``one_at_a_time``; bf16 or fp16.  The operator is the one below torch's ``varlen_attn``,
    which torch has from 2.10 on, and with other arguments in each version; the operator is the same since 2.7.
    Its backward adds up in no fixed order, unless ``torch.use_deterministic_algorithms`` is on.

    Source: Dao 2023, FlashAttention-2.
    """
    result: Tensor = _Flash.apply(query, key, value, sequences, form)
    return result


class _Flash(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, form: Form) -> Tensor:
        ends = sequences.ends_q, sequences.ends_k, sequences.longest_q, sequences.longest_k
        output, log_sum_exp, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *ends, 0.0, form.causal, False, **_options(form)
        )
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *ends[:2], *state)
        ctx.longest, ctx.form = ends[2:], form
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        *tensors, ends_q, ends_k, state, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            upstream, *tensors, ends_q, ends_k, *ctx.longest, 0.0, ctx.form.causal, state, unused, **_options(ctx.form)
        )
        return *gradients, None, None


def _options(form: Form) -> dict[str, Any]:
    left, right = form.window
    sides = {"window_size_left": left, "window_size_right": 0 if form.causal and left != ANY else right}
    return {"scale": form.scale, **({} if form.window == (ANY, ANY) else sides)}


def one_at_a_time(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, form: Form, sinks: Tensor | None = None
) -> Tensor:
    """Attend sequence by sequence.

    Args:
        query: (tokens_q, heads, size).
        key: (tokens_k, kv_heads, size); heads is a multiple of kv_heads, and key head i serves the query heads from
            ``i * heads / kv_heads`` on.
        value: (tokens_k, kv_heads, value size).
        sequences: where each sequence lies.
        form: which tokens see which.
        sinks: (heads,) logits of a key without a value, which all queries of the head see; None for none.

    Returns:
        (tokens_q, heads, value size) in query's type; 0 for tokens after the last sequence.

    Raises:
        AttentionInputError: a sequence ends behind the last token.
    """
    heads = query.shape[1]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    outputs = [_attend(*parts, form, sinks) for parts in _each(query, key, value, sequences)]
    missing = query.shape[0] - sum(output.shape[0] for output in outputs)
    return torch.cat([*outputs, query.new_zeros(missing, heads, value.shape[2])])


def _each(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the queries, keys and values of each sequence, as views."""
    ends_q, ends_k = sequences.ends_q.tolist(), sequences.ends_k.tolist()
    if ends_q[-1] > query.shape[0] or ends_k[-1] > key.shape[0]:
        raise AttentionInputError(
            f"the last sequence ends at query {ends_q[-1]} and key {ends_k[-1]}, and there are {query.shape[0]} "
            f"queries and {key.shape[0]} keys: the lengths are those of another batch"
        )
    for (first_q, end_q), (first_k, end_k) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        yield query[first_q:end_q], key[first_k:end_k], value[first_k:end_k]


def _attend(query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None) -> Tensor:
    """Attend in one sequence; (queries, heads, size) and as many key heads as query heads."""
    queries, keys = query.shape[0], key.shape[0]
    if not queries or not keys:
        return query.new_zeros(queries, query.shape[1], value.shape[2])
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    hidden = None if _all_seen(form, queries, keys) else _hidden(form, queries, keys, query.device)
    if form.softcap or sinks is not None or queries > keys:
        return _in_full(query, key, value, hidden, form, sinks).transpose(0, 1)
    causal = form.causal and queries == keys and hidden is None
    mask = None if hidden is None else ~hidden
    attended = scaled_dot_product_attention(
        query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), mask, is_causal=causal, scale=form.scale
    )
    return attended.squeeze(0).transpose(0, 1)


def _all_seen(form: Form, queries: int, keys: int) -> bool:
    """Whether nothing is hidden but what torch's own ``is_causal`` hides."""
    left, right = form.window
    reaches = left == ANY or left >= keys - 1
    if form.causal:
        return reaches and queries == keys
    return reaches and (right == ANY or right >= queries - 1)


def _hidden(form: Form, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return (queries, keys), True where a query does not see a key."""
    ahead = torch.arange(keys, device=device) - (torch.arange(queries, device=device) + keys - queries).unsqueeze(1)
    left, right = form.window
    hidden = ahead > 0 if form.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if left != ANY:
        hidden = hidden | (ahead < -left)
    return hidden | (ahead > right) if right != ANY else hidden


def _in_full(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, form: Form, sinks: Tensor | None
) -> Tensor:
    """Attend with the whole matrix of scores, in fp32 or wider; all are (heads, tokens, size)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(1, 2)) * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if hidden is None and form.causal:
        hidden = _hidden(form, query.shape[1], key.shape[1], query.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=2)
    blind = None if hidden is None else hidden.all(1, keepdim=True)
    if blind is not None:  # a softmax over nothing is NaN, and so is its gradient
        scores = scores.masked_fill(blind, 0)
    weights = torch.softmax(scores, dim=2)[..., : key.shape[1]]
    attended = weights @ value.to(wide)
    return (attended if blind is None else attended.masked_fill(blind, 0)).to(query.dtype)
