"""Rotary position embedding in Triton, forward and backward; FlagGems' has no backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_fl_overlay.kernels.launch import launch


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by one angle per token and pair of elements, rounded once, with gradients to q and k.

    Args:
        q: (batch, heads, length, size), with any strides; elements i and i + size / 2 are a pair.
        k: (batch, its own number of heads, length, size).
        cos: (batch or 1, length, size).
        sin: like ``cos``.
    """
    result: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
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
    length,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    columns = tl.arange(0, HALF_BLOCK)
    inside = columns < HALF
    angles = token if SHARED else program
    cos += angles * 2 * HALF
    sin += angles * 2 * HALF
    c1 = tl.load(cos + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + HALF + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + HALF + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s1, s2 = -s2, -s1
    q += batch * q_batch + token * q_token
    _turn(q, q_result + program * Q_HEADS * 2 * HALF, q_head, c1, c2, s1, s2, columns, Q_HEADS, Q_BLOCK, HALF)
    k += batch * k_batch + token * k_token
    _turn(k, k_result + program * K_HEADS * 2 * HALF, k_head, c1, c2, s1, s2, columns, K_HEADS, K_BLOCK, HALF)


@triton.jit
def _turn(
    source,
    result,
    source_head,
    c1,
    c2,
    s1,
    s2,
    columns,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    heads = tl.arange(0, BLOCK)
    inside = (heads < HEADS)[:, None] & (columns < HALF)[None, :]
    at = source + heads[:, None] * source_head + columns[None, :]
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = result + heads[:, None] * 2 * HALF + columns[None, :]
    tl.store(to, (x1 * c1 - x2 * s1).to(result.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (x2 * c2 + x1 * s2).to(result.dtype.element_ty), mask=inside)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    """The rotation of each head's pairs (x1, x2), the halves of its last dimension, each (size / 2,).

    Forward, with the halves (c1, c2) of cos and (s1, s2) of sin::

        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2

    Backward is the transposed matrix, with the upstream gradient (d1, d2)::

        dx1 = d1 * c1 + d2 * s2
        dx2 = d2 * c2 - d1 * s1

    It is the forward with (-s2, -s1) in the place of (s1, s2), so one kernel does both.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_q: Tensor, upstream_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotated(upstream_q, upstream_k, cos, sin, back=True), None, None


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    q, k = (heads if heads.stride(-1) == 1 else heads.contiguous() for heads in (q, k))
    batch, q_heads, length, size = q.shape
    k_heads = k.shape[1]
    # A token's heads lie side by side, as in the projections before and after a rotation.
    q_result = torch.empty(batch, length, q_heads, size, dtype=q.dtype, device=q.device).transpose(1, 2)
    k_result = torch.empty(batch, length, k_heads, size, dtype=k.dtype, device=k.device).transpose(1, 2)
    tensors = q, k, q_result, k_result, cos.contiguous(), sin.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3]
    constants = _blocks(q_heads, k_heads, size)
    launch(_rotate, (batch * length,), *tensors, *strides, length, **constants, SHARED=cos.shape[0] == 1, BACK=back)
    return q_result, k_result


@functools.cache
def _blocks(q_heads: int, k_heads: int, size: int) -> dict[str, int]:
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": size // 2,
        "Q_BLOCK": triton.next_power_of_2(q_heads),
        "K_BLOCK": triton.next_power_of_2(k_heads),
        "HALF_BLOCK": triton.next_power_of_2(size // 2),
    }
