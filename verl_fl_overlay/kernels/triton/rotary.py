"""Rotary position embedding in Triton, forward and backward; FlagGems' has no backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_fl_overlay.kernels.launch import launch
from verl_fl_overlay.kernels.pairs import Layout, rotated


def rotate(heads: tuple[Tensor, ...], cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Return the heads of q, or of q and k, rotated in fp32 and rounded once, with gradients to them.

    Args:
        heads: one or two of (batch, its own number of heads, length, size), with any strides, of one type.
        cos: (batch or 1, length, width) of any floating type; (3, batch or 1, length, width) where a token has three
            positions.
        sin: like ``cos``.
        layout: which elements are a pair, and which angles they have.
    """
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    result: tuple[Tensor, ...] = _Rotate.apply(cos, sin, layout, False, *heads)
    return result


@triton.jit(do_not_specialize=["length"])
def _rotate(
    q,
    k,
    q_result,
    k_result,
    cos,
    sin,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    angle_position,
    angle_batch,
    angle_token,
    length,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    START: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SOURCE_STEP: tl.constexpr,
    SOURCE_APART: tl.constexpr,
    RESULT_STEP: tl.constexpr,
    RESULT_APART: tl.constexpr,
    ANGLE_STEP: tl.constexpr,
    ANGLE_APART: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    pair = tl.arange(0, PAIRS_BLOCK)
    inside = pair < PAIRS
    position = (pair >= SECOND).to(tl.int64) + (pair >= THIRD).to(tl.int64)
    angle = batch * angle_batch + token * angle_token + position * angle_position + pair * ANGLE_STEP
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + angle + ANGLE_APART, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + angle + ANGLE_APART, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s1, s2 = -s2, -s1
    source, result = START + pair * SOURCE_STEP, START + pair * RESULT_STEP
    q += batch * q_batch + token * q_token
    q_result += program * Q_HEADS * SIZE
    _turn(
        q, q_result, q_head, c1, c2, s1, s2, source, result, inside, Q_HEADS, Q_BLOCK, SIZE, SOURCE_APART, RESULT_APART
    )
    if SIZE > 2 * PAIRS:
        _keep(q, q_result, q_head, Q_HEADS, Q_BLOCK, SIZE, START, PAIRS, REST_BLOCK)
    if K_HEADS > 0:
        k += batch * k_batch + token * k_token
        k_result += program * K_HEADS * SIZE
        _turn(
            k,
            k_result,
            k_head,
            c1,
            c2,
            s1,
            s2,
            source,
            result,
            inside,
            K_HEADS,
            K_BLOCK,
            SIZE,
            SOURCE_APART,
            RESULT_APART,
        )
        if SIZE > 2 * PAIRS:
            _keep(k, k_result, k_head, K_HEADS, K_BLOCK, SIZE, START, PAIRS, REST_BLOCK)


@triton.jit
def _turn(
    heads,
    results,
    heads_stride,
    c1,
    c2,
    s1,
    s2,
    source,
    result,
    inside,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SOURCE_APART: tl.constexpr,
    RESULT_APART: tl.constexpr,
) -> None:
    """Rotate the pairs of a token's heads."""
    head = tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & inside[None, :]
    at = heads + head[:, None] * heads_stride + source[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + SOURCE_APART, mask=mask, other=0.0).to(tl.float32)
    to = results + head[:, None] * SIZE + result[None, :]
    tl.store(to, (x1 * c1 - x2 * s1).to(results.dtype.element_ty), mask=mask)
    tl.store(to + RESULT_APART, (x2 * c2 + x1 * s2).to(results.dtype.element_ty), mask=mask)


@triton.jit
def _keep(
    heads,
    results,
    heads_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    START: tl.constexpr,
    PAIRS: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    """Copy the elements of a token's heads that lie outside of the rotated part: all after it, or all before it."""
    head, column = tl.arange(0, BLOCK), tl.arange(0, REST_BLOCK)
    mask = (head < HEADS)[:, None] & (column < SIZE - 2 * PAIRS)[None, :]
    if START == 0:
        column += 2 * PAIRS
    kept = tl.load(heads + head[:, None] * heads_stride + column[None, :], mask=mask, other=0.0)
    tl.store(results + head[:, None] * SIZE + column[None, :], kept, mask=mask)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """The rotation of each head's pairs (x1, x2).

    Forward, with a pair's own (c1, c2) of cos and (s1, s2) of sin::

        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2

    Backward is the transposed matrix, with the upstream gradient (d1, d2)::

        dx1 = d1 * c1 + d2 * s2
        dx2 = d2 * c2 - d1 * s1

    It is the forward with (-s2, -s1) in the place of (s1, s2), from the result's places to the source's.  So one kernel
    does both, and the backward has a backward.
    """

    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, layout: Layout, back: bool, *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.layout, ctx.back = layout, back
        return _rotated(cos, sin, layout, back, heads)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        back = not ctx.back
        # torch.autograd.grad(is_grads_batched=True) runs one backward for several gradients at once.
        if any(map(torch._C._functorch.is_legacy_batchedtensor, upstream)):
            return None, None, None, None, *(rotated(each, cos, sin, ctx.layout, back) for each in upstream)
        return None, None, None, None, *_Rotate.apply(cos, sin, ctx.layout, back, *upstream)


def _rotated(cos: Tensor, sin: Tensor, layout: Layout, back: bool, heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    heads = tuple(each if each.stride(-1) == 1 else each.contiguous() for each in heads)
    batch, _, length, size = heads[0].shape
    # A token's heads lie side by side, as in the projections before and after a rotation.
    results = tuple(
        torch.empty(batch, length, each.shape[1], size, dtype=each.dtype, device=each.device).transpose(1, 2)
        for each in heads
    )
    q, k, q_result, k_result = heads[0], heads[-1], results[0], results[-1]
    *position, row, token, _ = cos.stride()
    angles = position[0] if position else 0, row if cos.shape[-3] > 1 else 0, token
    strides = *q.stride()[:3], *k.stride()[:3], *angles
    constants = _constants(layout, size, q.shape[1], k.shape[1] if len(heads) == 2 else 0, back)
    launch(_rotate, (batch * length,), q, k, q_result, k_result, cos, sin, *strides, length, **constants)
    return results


@functools.cache
def _constants(layout: Layout, size: int, q_heads: int, k_heads: int, back: bool) -> dict[str, int]:
    source, result = (layout.result, layout.source) if back else (layout.source, layout.result)
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "Q_BLOCK": triton.next_power_of_2(q_heads),
        "K_BLOCK": triton.next_power_of_2(max(k_heads, 1)),
        "SIZE": size,
        "START": layout.start,
        "PAIRS": layout.number,
        "PAIRS_BLOCK": triton.next_power_of_2(layout.number),
        "REST_BLOCK": triton.next_power_of_2(max(size - 2 * layout.number, 1)),
        "SOURCE_STEP": source.step,
        "SOURCE_APART": source.apart,
        "RESULT_STEP": result.step,
        "RESULT_APART": result.apart,
        "ANGLE_STEP": layout.angles.step,
        "ANGLE_APART": layout.angles.apart,
        "SECOND": layout.sections[0],
        "THIRD": layout.sections[1],
        "BACK": back,
    }
