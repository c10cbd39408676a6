"""RMS norm in Triton, forward and backward.

FlagGems has one too, but to use it every process would have to import all of FlagGems, which takes 4 s.
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

BLOCK = 2048
"""The fewest elements that a program holds: a whole row, or several."""

PROGRAMS = 512
"""Programs of the backward, each with a partial sum of the weight's gradient: four for each of 128 cores."""


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``values / sqrt(mean(values ** 2) + epsilon) * weight``, rounded once, with gradients.

    Args:
        values: (..., size), bf16, fp16 or fp32, with any strides.
        weight: (size,), of the same type.
        epsilon: is added to the mean of the squares.
    """
    result: Tensor = _RMSNorm.apply(values, weight, epsilon)
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
    """RMS norm of the rows x (size,) of ``values``, with the weight w (size,).

    Forward, for each row: ``r = 1 / sqrt(mean(x ** 2) + epsilon)`` and ``y = x * r * w``.  It keeps r, one fp32 number
    a row.

    Backward, for each row, with the upstream gradient d (size,) of y::

        dx = r * (d * w - x * r * mean(d * w * x * r))
        dw = sum over all rows of d * x * r

    Each program sums dw over its own rows in fp32; torch adds the programs' sums, (programs, size), at the end.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        values, weight = values.contiguous(), weight.contiguous()
        result = torch.empty_like(values)
        size = weight.numel()
        rows = values.numel() // size
        inverse = torch.empty(rows, dtype=torch.float32, device=values.device)
        blocks = _blocks(size)
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
        blocks = _blocks(size)
        programs = min(PROGRAMS, triton.cdiv(rows, blocks["ROWS"]))
        to_weight = torch.empty(programs, size, dtype=torch.float32, device=values.device)
        tensors = values, weight, inverse, upstream.contiguous(), to_values, to_weight
        launch(_rms_norm_gradient, (programs,), *tensors, rows, size, **blocks)
        wanted = ctx.needs_input_grad[1]  # not if the norm is frozen, as with LoRA
        return to_values, to_weight.sum(0).to(weight.dtype) if wanted else None, None


@functools.cache
def _blocks(size: int) -> dict[str, int]:
    """Return how many rows a program takes, and its warps: 16 elements for each of their threads."""
    block = triton.next_power_of_2(size)
    rows = max(1, BLOCK // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}
