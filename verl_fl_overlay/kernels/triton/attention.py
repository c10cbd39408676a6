"""Attention over packed sequences in Triton, forward and backward, for chips on which flash-attn does not exist.

The algorithm is that of FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691): the scores of a block of
queries and a block of keys are made, used and forgotten on the chip, so that memory grows with the tokens and not with
their square.  No sum is left to the order in which programs end: two backwards of the same tensors give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_fl_overlay.kernels.launch import launch
from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences
from verl_fl_overlay.kernels.triton import LARGEST_HEAD


class Blocks(NamedTuple):
    """How a kernel is cut: queries and keys of a block, and the warps and pipeline stages of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = {
    (32, 2): Blocks(128, 64, 4, 3),
    (64, 2): Blocks(128, 64, 4, 3),
    (128, 2): Blocks(128, 64, 8, 3),
    (256, 2): Blocks(128, 32, 8, 2),
    (32, 4): Blocks(32, 32, 8, 1),
    (64, 4): Blocks(32, 32, 8, 1),
    (128, 4): Blocks(32, 32, 8, 1),
    (256, 4): Blocks(16, 32, 8, 1),
}
"""Blocks of the forward, by the head size as a power of two and the bytes of an element."""

QUERY_GRADIENT = {
    (32, 2): Blocks(128, 64, 4, 3),
    (64, 2): Blocks(128, 64, 4, 3),
    (128, 2): Blocks(128, 64, 8, 2),
    (256, 2): Blocks(64, 32, 4, 2),
    (32, 4): Blocks(32, 32, 8, 1),
    (64, 4): Blocks(32, 32, 8, 1),
    (128, 4): Blocks(16, 32, 8, 1),
    (256, 4): Blocks(16, 16, 8, 1),
}
"""Blocks of the kernel that makes the gradient of the queries."""

KEY_GRADIENT = {
    (32, 2): Blocks(64, 128, 4, 3),
    (64, 2): Blocks(64, 128, 8, 3),
    (128, 2): Blocks(64, 128, 8, 2),
    (256, 2): Blocks(32, 64, 8, 2),
    (32, 4): Blocks(32, 32, 8, 1),
    (64, 4): Blocks(32, 32, 8, 1),
    (128, 4): Blocks(16, 32, 8, 1),
    (256, 4): Blocks(16, 32, 8, 1),
}
"""Blocks of the kernel that makes the gradients of keys and values."""

PROGRAMS = 2048
"""Programs that keep a chip busy to the end although some have much more to do: 16 for each of 128 cores."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, form: Form, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention of packed queries to packed keys, (tokens_q, heads, size of a value), rounded once.

    Its gradients go to query, key, value and sinks.  A token after the last sequence gets 0, and its gradients are 0.

    Args:
        query: (tokens_q, heads, size), bf16, fp16 or fp32, with any strides; sizes up to 256.
        key: (tokens_k, kv_heads, size), of the same type; head h of the queries sees head h // (heads // kv_heads).
        value: (tokens_k, kv_heads, its own size), of the same type.
        sequences: where they lie, on the device of the tokens.
        form: which keys a query sees, and its score for one.
        sinks: (heads,), of any float type: a score that joins a head's softmax as one more key, whose value is 0.  It
            is neither scaled nor capped.

    Raises:
        ValueError: the tensors do not fit together, a head is too large, or the scale is not positive.
    """
    heads, size = query.shape[1:]
    fits = key.shape[2] == size and key.shape[:2] == value.shape[:2] and heads % key.shape[1] == 0
    if not fits or not query.dtype == key.dtype == value.dtype or (sinks is not None and sinks.shape != (heads,)):
        tensors = {"query": query, "key": key, "value": value, "sinks": sinks}
        found = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items() if t is not None)
        raise ValueError(f"these do not fit together: {found}")
    if max(size, value.shape[2]) > LARGEST_HEAD:
        raise ValueError(f"heads of {size} and {value.shape[2]} are larger than {LARGEST_HEAD}")
    if form.scale <= 0:
        raise ValueError(f"the scale must be positive, it is {form.scale}")
    result: Tensor = _Attend.apply(query, key, value, sinks, sequences, form)
    return result


@triton.jit
def _locate(
    ends, other_ends, tokens, sequences, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return which block this program has: its first token in its sequence, and where sequence and other side lie.

    Sequence i has the programs from ``ends[i] // BLOCK + i`` on, which are at least as many as its blocks: so the
    programs need no table.  The tokens after the last sequence are one more, which has nothing on the other side.
    A program without a block gets a first token that is not in the sequence.
    """
    program = tl.program_id(1)
    low, high = 0, sequences
    while low < high:
        middle = (low + high + 1) // 2
        begun = tl.load(ends + middle) // BLOCK + middle <= program
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    following = tl.minimum(low + 1, sequences)
    begin, other_begin = tl.load(ends + low), tl.load(other_ends + low)
    count = tl.where(low < sequences, tl.load(ends + following), tokens) - begin
    block = program - (begin // BLOCK + low)
    if LAST_FIRST:
        block = (count + BLOCK - 1) // BLOCK - 1 - block
    return (
        block * BLOCK,
        begin.to(tl.int64),
        count,
        other_begin.to(tl.int64),
        tl.load(other_ends + following) - other_begin,
    )


@triton.jit
def _span(first, last, count, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return which of ``count`` positions the block from ``first`` to ``last`` deals with: start, whole, cut, stop.

    Each position deals with those from BEFORE before it to AFTER after it; -1 is no limit.  From ``start`` to ``whole``
    and from ``cut`` to ``stop`` not all pairs need be of that kind, from ``whole`` to ``cut`` all are.
    """
    start, whole, stop, cut = 0, 0, count, count
    if BEFORE >= 0:
        start = tl.maximum(first - BEFORE, 0) // BLOCK * BLOCK
        whole = (tl.maximum(last - BEFORE, 0) + BLOCK - 1) // BLOCK * BLOCK
    if AFTER >= 0:
        stop = tl.maximum(tl.minimum(last + AFTER + 1, count), 0)
        cut = tl.maximum(tl.minimum(first + AFTER + 1, count), 0)
    whole = tl.minimum(whole, stop)
    return start, whole, tl.maximum(cut // BLOCK * BLOCK, whole), stop


@triton.jit
def _tile(
    base,
    stride,
    count,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    TURNED: tl.constexpr,
) -> tl.tensor:
    """Return ROWS tokens of one head, or their transpose; columns from SIZE on are 0, and if CUT rows from count on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if TURNED:
        row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None]
    at = base + row * stride + column
    if CUT and SIZE < COLUMNS:
        values = tl.load(at, mask=(row < count) & (column < SIZE), other=0.0)
    elif CUT:
        values = tl.load(at, mask=row < count, other=0.0)
    elif SIZE < COLUMNS:
        values = tl.load(at, mask=column < SIZE, other=0.0)
    else:
        values = tl.load(at)
    return values


@triton.jit
def _vector(base, count, other, ROWS: tl.constexpr, CUT: tl.constexpr) -> tl.tensor:
    row = tl.arange(0, ROWS)
    return tl.load(base + row, mask=row < count, other=other) if CUT else tl.load(base + row)


@triton.jit
def _store(base, stride, count, values, ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < count) & (column < SIZE)
    tl.store(base + row * stride + column, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _bent(products, inner, CAPPED: tl.constexpr) -> tl.tensor:
    """Return ``tanh(scale * products / softcap)`` where there is a soft cap; ``inner`` is as ``_scores`` returns it."""
    if CAPPED:
        products = 1.0 - 2.0 / (tl.exp2(products * inner) + 1.0)
    return products


@triton.jit
def _seen(distance, LEFT: tl.constexpr, RIGHT: tl.constexpr) -> tl.tensor:
    """Return whether a query sees the key that is so far after the one beside it."""
    seen = distance == distance
    if LEFT >= 0:
        seen = seen & (distance >= -LEFT)
    if RIGHT >= 0:
        seen = seen & (distance <= RIGHT)
    return seen


@triton.jit
def _forward_over(
    first,
    last,
    total,
    most,
    sums,
    q,
    beside,
    key,
    value,
    key_token,
    value_token,
    count,
    inner,
    factor,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    CUT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Take the keys from ``first`` to ``last`` into the softmax of a block of queries; all are seen unless CUT."""
    for start in range(first, last, KEYS):
        row = tl.cast(start, tl.int64)
        k = _tile(key + row * key_token, key_token, count - start, KEYS, SIZE, COLUMNS, CUT, True)
        products = _bent(tl.dot(q, k, input_precision="ieee"), inner, CAPPED)
        if CUT:
            position = start + tl.arange(0, KEYS)
            seen = _seen(position[None, :] - beside[:, None], LEFT, RIGHT) & (position < count)[None, :]
            products = tl.where(seen, products, float("-inf"))
        larger = tl.maximum(most, tl.max(products, 1) * factor)
        shift = larger
        if CUT:
            shift = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(products * factor - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        v = _tile(value + row * value_token, value_token, count - start, KEYS, SIZE_V, COLUMNS_V, CUT, False)
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
        most = larger
    return total, most, sums


@triton.jit(do_not_specialize=["tokens", "sequences"])
def _forward(
    query,
    key,
    value,
    sinks,
    result,
    normalizer,
    ends_q,
    ends_k,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    tokens,
    sequences,
    inner,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    first, begin_q, count_q, begin_k, count_k = _locate(ends_q, ends_k, tokens, sequences, QUERIES, True)
    if (first < 0) | (first >= count_q):
        return
    head = tl.program_id(0).to(tl.int64)
    place, left = begin_q + first, count_q - first
    query += head * query_head + place * query_token
    key += head // GROUP * key_head + begin_k * key_token
    value += head // GROUP * value_head + begin_k * value_token
    q = _tile(query, query_token, left, QUERIES, SIZE, COLUMNS, True, False)

    total = tl.zeros([QUERIES], tl.float32)
    most = total - float("inf")
    if sinks is not None:
        total += 1.0
        most = total * (tl.load(sinks + head).to(tl.float32) * 1.4426950408889634)
    sums = tl.zeros([QUERIES, COLUMNS_V], tl.float32)
    row = tl.arange(0, QUERIES)
    beside = first + row + (count_k - count_q)
    nearest = first + (count_k - count_q)
    furthest = nearest + tl.minimum(QUERIES, left) - 1
    start, whole, cut, stop = _span(nearest, furthest, count_k, LEFT, RIGHT, KEYS)
    if LEFT >= 0:
        total, most, sums = _forward_over(
            start, whole, total, most, sums, q, beside, key, value, key_token, value_token, count_k, inner, factor,
            KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
        )  # fmt: skip
    total, most, sums = _forward_over(
        whole, cut, total, most, sums, q, beside, key, value, key_token, value_token, count_k, inner, factor,
        KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, False,
    )  # fmt: skip
    total, most, sums = _forward_over(
        cut, stop, total, most, sums, q, beside, key, value, key_token, value_token, count_k, inner, factor,
        KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
    )  # fmt: skip

    # A query that sees nothing has the total 0; with infinity in the normalizer's place all its weights are 0 backward.
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    most = tl.where(nothing, float("inf"), most + tl.log2(total))
    tl.store(normalizer + head * tokens + place + row, most, mask=row < left)
    stride = tl.num_programs(0) * SIZE_V
    result += place * stride + head * SIZE_V
    _store(result, stride, left, sums * (1.0 / total)[:, None], QUERIES, SIZE_V, COLUMNS_V)


@triton.jit
def _query_gradient_over(
    first,
    last,
    sums,
    q,
    upstream,
    normalizer,
    delta,
    beside,
    key,
    value,
    key_token,
    value_token,
    count,
    inner,
    factor,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    CUT: tl.constexpr,
) -> tl.tensor:
    for start in range(first, last, KEYS):
        row = tl.cast(start, tl.int64)
        k = _tile(key + row * key_token, key_token, count - start, KEYS, SIZE, COLUMNS, CUT, False)
        v = _tile(value + row * value_token, value_token, count - start, KEYS, SIZE_V, COLUMNS_V, CUT, True)
        products = _bent(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, CAPPED)
        weights = tl.exp2(products * factor - normalizer[:, None])
        changes = weights * (tl.dot(upstream, v, input_precision="ieee") - delta[:, None])
        if CAPPED:
            changes *= 1.0 - products * products
        if CUT:
            position = start + tl.arange(0, KEYS)
            seen = _seen(position[None, :] - beside[:, None], LEFT, RIGHT) & (position < count)[None, :]
            changes = tl.where(seen, changes, 0.0)
        sums = tl.dot(changes.to(k.dtype), k, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["tokens", "sequences"])
def _query_gradient(
    query,
    key,
    value,
    result,
    upstream,
    normalizer,
    delta,
    to_query,
    ends_q,
    ends_k,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    upstream_token,
    upstream_head,
    tokens,
    sequences,
    scale,
    inner,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    first, begin_q, count_q, begin_k, count_k = _locate(ends_q, ends_k, tokens, sequences, QUERIES, True)
    if (first < 0) | (first >= count_q):
        return
    head = tl.program_id(0).to(tl.int64)
    place, left = begin_q + first, count_q - first
    query += head * query_head + place * query_token
    upstream += head * upstream_head + place * upstream_token
    key += head // GROUP * key_head + begin_k * key_token
    value += head // GROUP * value_head + begin_k * value_token
    q = _tile(query, query_token, left, QUERIES, SIZE, COLUMNS, True, False)
    d = _tile(upstream, upstream_token, left, QUERIES, SIZE_V, COLUMNS_V, True, False)
    stride = tl.num_programs(0) * SIZE_V
    o = _tile(result + place * stride + head * SIZE_V, stride, left, QUERIES, SIZE_V, COLUMNS_V, True, False)

    row = tl.arange(0, QUERIES)
    at = head * tokens + place + row
    along = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    tl.store(delta + at, along, mask=row < left)
    log_sum = tl.load(normalizer + at, mask=row < left, other=float("inf"))
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    beside = first + row + (count_k - count_q)
    nearest = first + (count_k - count_q)
    furthest = nearest + tl.minimum(QUERIES, left) - 1
    start, whole, cut, stop = _span(nearest, furthest, count_k, LEFT, RIGHT, KEYS)
    if LEFT >= 0:
        sums = _query_gradient_over(
            start, whole, sums, q, d, log_sum, along, beside, key, value, key_token, value_token, count_k, inner,
            factor, KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
        )  # fmt: skip
    sums = _query_gradient_over(
        whole, cut, sums, q, d, log_sum, along, beside, key, value, key_token, value_token, count_k, inner,
        factor, KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, False,
    )  # fmt: skip
    sums = _query_gradient_over(
        cut, stop, sums, q, d, log_sum, along, beside, key, value, key_token, value_token, count_k, inner,
        factor, KEYS, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
    )  # fmt: skip
    stride = tl.num_programs(0) * SIZE
    _store(to_query + place * stride + head * SIZE, stride, left, sums * scale, QUERIES, SIZE, COLUMNS)


@triton.jit
def _key_gradient_over(
    first,
    last,
    key_sums,
    value_sums,
    k,
    v,
    position,
    query,
    upstream,
    normalizer,
    delta,
    query_token,
    upstream_token,
    shift,
    count,
    inner,
    factor,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    CUT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """As ``_query_gradient_over``, but scores are (keys, queries), so that they need not be turned for the sums."""
    for start in range(first, last, QUERIES):
        row, left = tl.cast(start, tl.int64), count - start
        at = tl.arange(0, QUERIES)
        q = _tile(query + row * query_token, query_token, left, QUERIES, SIZE, COLUMNS, CUT, False)
        log_sum = _vector(normalizer + row, left, float("inf"), QUERIES, CUT)
        products = _bent(tl.dot(k, tl.trans(q), input_precision="ieee"), inner, CAPPED)
        weights = tl.exp2(products * factor - log_sum[None, :])
        if CUT and (LEFT >= 0 or RIGHT >= 0):
            weights = tl.where(_seen(position[:, None] - (at + (start + shift))[None, :], LEFT, RIGHT), weights, 0.0)
        d = _tile(upstream + row * upstream_token, upstream_token, left, QUERIES, SIZE_V, COLUMNS_V, CUT, False)
        value_sums = tl.dot(weights.to(d.dtype), d, value_sums, input_precision="ieee")
        along = _vector(delta + row, left, 0.0, QUERIES, CUT)
        changes = weights * (tl.dot(v, tl.trans(d), input_precision="ieee") - along[None, :])
        if CAPPED:
            changes *= 1.0 - products * products
        key_sums = tl.dot(changes.to(q.dtype), q, key_sums, input_precision="ieee")
    return key_sums, value_sums


@triton.jit(do_not_specialize=["tokens", "other_tokens", "sequences"])
def _key_gradient(
    query,
    key,
    value,
    upstream,
    normalizer,
    delta,
    to_key,
    to_value,
    ends_q,
    ends_k,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    upstream_token,
    upstream_head,
    tokens,
    other_tokens,
    sequences,
    scale,
    inner,
    factor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE_V: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    first, begin_k, count_k, begin_q, count_q = _locate(ends_k, ends_q, tokens, sequences, KEYS, False)
    if first >= count_k:
        return
    heads = tl.num_programs(0) // PARTS
    part, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    place, left = begin_k + first, count_k - first
    key += head * key_head + place * key_token
    value += head * value_head + place * value_token
    k = _tile(key, key_token, left, KEYS, SIZE, COLUMNS, True, False)
    v = _tile(value, value_token, left, KEYS, SIZE_V, COLUMNS_V, True, False)

    key_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    value_sums = tl.zeros([KEYS, COLUMNS_V], tl.float32)
    shift = count_k - count_q
    position = first + tl.arange(0, KEYS)
    nearest = first - shift
    furthest = nearest + tl.minimum(KEYS, left) - 1
    start, whole, cut, stop = _span(nearest, furthest, count_q, RIGHT, LEFT, QUERIES)
    for member in range(GROUP // PARTS):
        of = head * GROUP + part * (GROUP // PARTS) + member
        q = query + of * query_head + begin_q * query_token
        d = upstream + of * upstream_head + begin_q * upstream_token
        n, a = normalizer + of * other_tokens + begin_q, delta + of * other_tokens + begin_q
        if RIGHT >= 0:
            key_sums, value_sums = _key_gradient_over(
                start, whole, key_sums, value_sums, k, v, position, q, d, n, a, query_token, upstream_token, shift,
                count_q, inner, factor, QUERIES, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
            )  # fmt: skip
        key_sums, value_sums = _key_gradient_over(
            whole, cut, key_sums, value_sums, k, v, position, q, d, n, a, query_token, upstream_token, shift,
            count_q, inner, factor, QUERIES, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, False,
        )  # fmt: skip
        key_sums, value_sums = _key_gradient_over(
            cut, stop, key_sums, value_sums, k, v, position, q, d, n, a, query_token, upstream_token, shift,
            count_q, inner, factor, QUERIES, SIZE, COLUMNS, SIZE_V, COLUMNS_V, LEFT, RIGHT, CAPPED, True,
        )  # fmt: skip
    row = part.to(tl.int64) * tokens + place
    to_key += (row * heads + head) * SIZE
    to_value += (row * heads + head) * SIZE_V
    _store(to_key, heads * SIZE, left, key_sums * scale, KEYS, SIZE, COLUMNS)
    _store(to_value, heads * SIZE_V, left, value_sums, KEYS, SIZE_V, COLUMNS_V)


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """Attention of the queries q (m, size) of a head of a sequence to its keys k (n, size) and values v (n, size).

    Forward: with the scores ``s = scale * q @ k.T``, or ``s = softcap * tanh(scale * q @ k.T / softcap)``, which are
    minus infinity where a query does not see a key::

        l = log(exp(sink) + exp(s).sum(1))  (no sink: without its term)
        p = exp(s - l)
        o = p @ v

    Beside q, k, v and o it keeps l, one fp32 number for each query, divided by log(2): the kernels compute powers of 2,
    which chips are faster at.

    Backward, with the upstream gradient d (m, size) of o and ``a = (d * o).sum(1)``::

        ds = p * (d @ v.T - a) * (1, or 1 - (s / softcap) ** 2)
        dq = scale * ds @ k
        dk = scale * ds.T @ q    (summed over the heads that see this one)
        dv = p.T @ d             (likewise)
        dsink = -sum over all queries of exp(sink - l) * a

    One kernel makes a and dq, a block of queries at a time; another dk and dv, a block of keys at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, sequences: Sequences, form: Form
    ) -> Tensor:
        query, key, value = _unit_columns(query), _unit_columns(key), _unit_columns(value)
        tokens, heads, _ = query.shape
        result = query.new_empty(tokens, heads, value.shape[2])
        normalizer = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, sinks, result, normalizer, sequences.ends_q, sequences.ends_k)
        ctx.form = form
        if result.numel():
            blocks, number = _cut(FORWARD, query, value), sequences.ends_q.numel() - 1
            tensors = query, key, value, sinks, result, normalizer, sequences.ends_q, sequences.ends_k
            numbers = *_strides(query, key, value), tokens, number, *_scores(form)
            grid = heads, tokens // blocks.queries + number + 1
            launch(_forward, grid, *tensors, *numbers, **_constants(blocks, query, key, value, form))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, result, normalizer, *ends = ctx.saved_tensors
        upstream = _unit_columns(upstream)
        (tokens, heads, size), (tokens_k, kv_heads, size_v) = query.shape, value.shape
        to_query, delta = query.new_empty(query.shape), torch.empty_like(normalizer)
        strides, number = _strides(query, key, value, upstream), ends[0].numel() - 1
        scores = ctx.form.scale, *_scores(ctx.form)
        if result.numel():
            blocks = _cut(QUERY_GRADIENT, query, value)
            tensors = query, key, value, result, upstream, normalizer, delta, to_query, *ends
            grid = heads, tokens // blocks.queries + number + 1
            constants = _constants(blocks, query, key, value, ctx.form)
            launch(_query_gradient, grid, *tensors, *strides, tokens, number, *scores, **constants)
        blocks = _cut(KEY_GRADIENT, query, value)
        programs = tokens_k // blocks.keys + number + 1
        parts = _parts(heads // kv_heads, kv_heads * programs)
        to_key = key.new_empty(parts, tokens_k, kv_heads, size)
        to_value = value.new_empty(parts, tokens_k, kv_heads, size_v)
        if to_key.numel():
            tensors = query, key, value, upstream, normalizer, delta, to_key, to_value, *ends
            constants = _constants(blocks, query, key, value, ctx.form)
            numbers = *strides, tokens_k, tokens, number, *scores
            launch(_key_gradient, (kv_heads * parts, programs), *tensors, *numbers, PARTS=parts, **constants)
        to_key, to_value = (each.sum(0) if parts > 1 else each[0] for each in (to_key, to_value))
        to_sinks = None
        if ctx.needs_input_grad[3]:
            weights = torch.exp2(sinks.float()[:, None] / math.log(2) - normalizer)
            to_sinks = -(weights * delta).sum(1).to(sinks.dtype)
        return to_query, to_key, to_value, to_sinks, None, None


def _unit_columns(heads: Tensor) -> Tensor:
    return heads if heads.stride(2) == 1 else heads.contiguous()


def _strides(*tensors: Tensor) -> Sequence[int]:
    return [tensor.stride(axis) for tensor in tensors for axis in (0, 1)]


def _columns(tensor: Tensor) -> int:
    columns: int = max(32, triton.next_power_of_2(tensor.shape[2]))
    return columns


def _cut(table: dict[tuple[int, int], Blocks], query: Tensor, value: Tensor) -> Blocks:
    return table[max(_columns(query), _columns(value)), query.element_size()]


def _scores(form: Form) -> tuple[float, float]:
    """Return what ``_bent`` multiplies products with, and what makes them scores of powers of 2 after it."""
    if form.softcap:
        return 2 * form.scale / form.softcap / math.log(2), form.softcap / math.log(2)
    return 0.0, form.scale / math.log(2)


def _constants(blocks: Blocks, query: Tensor, key: Tensor, value: Tensor, form: Form) -> dict[str, Any]:
    left, right = form.window
    if form.causal:
        right = 0 if right == ANY else min(right, 0)
    return {
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "SIZE": query.shape[2],
        "COLUMNS": _columns(query),
        "SIZE_V": value.shape[2],
        "COLUMNS_V": _columns(value),
        "GROUP": query.shape[1] // key.shape[1],
        "LEFT": left,
        "RIGHT": right,
        "CAPPED": form.softcap != 0,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _parts(group: int, programs: int) -> int:
    """Return into how many programs to divide the heads that see one, so that there are enough.

    With few kv heads the first keys of the longest sequence, which many queries of many heads see, would take longer
    than all the rest.  The parts are added up afterwards, which takes memory and time, so there are no more than it
    takes.
    """
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if parts * programs >= PROGRAMS), group)
