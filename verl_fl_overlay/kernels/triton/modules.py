"""The kernels of fused modules, in Triton, with gradients.

They are the overlay's own.  FlagGems' rotary embedding has no backward, on an H100 its ``silu_and_mul``, forward and
backward, takes longer than torch's separate operators (0.85 against 0.69 ms for 8,192 x 8,192 in bf16), and for its
RMS norm alone every process would import all of FlagGems, which takes 4 s.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_fl_overlay.kernels.launch import launch

BLOCK = 1024
"""Elements that a program of the gate's kernels holds."""

NORM_BLOCK = 2048
"""Elements, at least, that a program of the norm's kernels holds: a whole row, or several."""

NORM_PROGRAMS = 512
"""Programs of the norm's backward, each with a partial sum of the weight's gradient: four for each of 128 cores."""


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``values / sqrt(mean(values ** 2) + epsilon) * weight`` over the last dimension, with gradients."""
    result: Tensor = _RMSNorm.apply(values, weight, epsilon)
    return result


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, rounded once, with gradients; both of one shape and type."""
    result: Tensor = _SiluAndMul.apply(gate, up)
    return result


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k turned by an angle a token and a pair of elements, rounded once, with gradients.

    Args:
        q: (batch, heads, length, size), with any strides; elements i and i + size / 2 are a pair.
        k: (batch, fewer or as many heads, length, size).
        cos: (batch or 1, length, size).
        sin: like ``cos``.
    """
    result: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
    return result


@triton.jit(do_not_specialize=["rows", "epsilon"])
def _rms_norm(values, weight, result, inverse, rows, size, epsilon, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < size)[None, :]
    at = row[:, None] * size + columns[None, :]
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / size + epsilon)
    w = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    tl.store(inverse + row, r, mask=row < rows)
    tl.store(result + at, (x * r[:, None] * w[None, :]).to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_gradient(
    values, weight, inverse, upstream, to_values, to_weight, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    program, step = tl.program_id(0).to(tl.int64), tl.num_programs(0) * ROWS
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, step):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < size)[None, :]
        at = row[:, None] * size + columns[None, :]
        r = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * r
        d = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        total += d * x
        along = tl.sum(d * w * x, axis=1)[:, None] / size
        tl.store(to_values + at, ((d * w - x * along) * r).to(to_values.dtype.element_ty), mask=inside)
    tl.store(to_weight + program * size + columns, tl.sum(total, axis=0), mask=columns < size)


class _RMSNorm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        values, weight = values.contiguous(), weight.contiguous()
        result = torch.empty_like(values)
        size = weight.numel()
        rows = values.numel() // size
        inverse = torch.empty(rows, dtype=torch.float32, device=values.device)
        blocks = _norm_blocks(size)
        grid = (triton.cdiv(rows, blocks["ROWS"]),)
        launch(_rms_norm, grid, values, weight, result, inverse, rows, size, epsilon, **blocks)
        ctx.save_for_backward(values, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        values, weight, inverse = ctx.saved_tensors
        to_values = torch.empty_like(values)
        size, rows = weight.numel(), inverse.numel()
        blocks = _norm_blocks(size)
        programs = min(NORM_PROGRAMS, triton.cdiv(rows, blocks["ROWS"]))
        to_weight = torch.empty(programs, size, dtype=torch.float32, device=values.device)
        tensors = values, weight, inverse, upstream.contiguous(), to_values, to_weight
        launch(_rms_norm_gradient, (programs,), *tensors, rows, size, **blocks)
        wanted = ctx.needs_input_grad[1]  # not where the norm is frozen, as with LoRA
        return to_values, to_weight.sum(0).to(weight.dtype) if wanted else None, None


@functools.cache
def _norm_blocks(size: int) -> dict[str, int]:
    """Return how much of the rows one program takes; 16 elements for each of its threads."""
    block = triton.next_power_of_2(size)
    rows = max(1, NORM_BLOCK // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}


@triton.jit
def _silu_and_mul(gate, up, result, count, BLOCK: tl.constexpr) -> None:
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = where < count
    g = tl.load(gate + where, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + where, (g * tl.sigmoid(g) * u).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _silu_and_mul_gradient(gate, up, upstream, to_gate, to_up, count, BLOCK: tl.constexpr) -> None:
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = where < count
    g = tl.load(gate + where, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + where, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(upstream + where, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(to_gate + where, (d * u * s * (1 + g * (1 - s))).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + where, (d * g * s).to(to_up.dtype.element_ty), mask=inside)


class _SiluAndMul(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        result = torch.empty_like(gate)
        count = gate.numel()
        launch(_silu_and_mul, (triton.cdiv(count, BLOCK),), gate, up, result, count, BLOCK=BLOCK)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        count = gate.numel()
        tensors = gate, up, upstream.contiguous(), to_gate, to_up
        launch(_silu_and_mul_gradient, (triton.cdiv(count, BLOCK),), *tensors, count, BLOCK=BLOCK)
        return to_gate, to_up


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
    if BACK:  # the transposed matrix
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
    # A token's heads lie side by side, as the projections before and behind a rotation have them.
    q_result = torch.empty(batch, length, q_heads, size, dtype=q.dtype, device=q.device).transpose(1, 2)
    k_result = torch.empty(batch, length, k_heads, size, dtype=k.dtype, device=k.device).transpose(1, 2)
    tensors = q, k, q_result, k_result, cos.contiguous(), sin.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3]
    constants = _rotary_blocks(q_heads, k_heads, size)
    launch(_rotate, (batch * length,), *tensors, *strides, length, **constants, SHARED=cos.shape[0] == 1, BACK=back)
    return q_result, k_result


@functools.cache
def _rotary_blocks(q_heads: int, k_heads: int, size: int) -> dict[str, int]:
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": size // 2,
        "Q_BLOCK": triton.next_power_of_2(q_heads),
        "K_BLOCK": triton.next_power_of_2(k_heads),
        "HALF_BLOCK": triton.next_power_of_2(size // 2),
    }
