"""RMS norm and layer norm without a bias in Triton, forward and backward.

FlagGems has them too, but to use them every process would have to import all of FlagGems, which takes 4 s.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_fl_overlay.kernels import differentiation, norm_torch
from verl_fl_overlay.kernels.launch import launch
from verl_fl_overlay.kernels.norm_torch import Variant

BLOCK = 2048
"""The fewest elements that a program holds: a whole row, or several."""

PROGRAMS = 512
"""Programs of the backward, each with a partial sum of the weight's gradient: four for each of 128 cores."""


def norm(values: Tensor, weight: Tensor | None, epsilon: float, variant: Variant) -> Tensor:
    """Return what ``norm_torch.norm`` returns, with gradients.

    Args:
        values: (..., size), bf16, fp16 or fp32, with any strides.
        weight: (size,), bf16, fp16 or fp32, or None.
        epsilon: is added to the mean of the squares.
        variant: which norm it is.
    """
    if weight is not None:
        weight = weight.contiguous()
    result: Tensor = _Norm.apply(values.contiguous(), weight, epsilon, variant)
    return result


@triton.jit(do_not_specialize=["rows", "epsilon", "offset"])
def _norm(
    values,
    weight,
    result,
    inverse,
    rows,
    size,
    epsilon,
    offset,
    WEIGHTED: tl.constexpr,
    CENTRED: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < size)[None, :]
    at = row[:, None] * size + columns[None, :]
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=1)[:, None] / size, 0.0)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / size + epsilon)
    tl.store(inverse + row, r, mask=row < rows)
    y = x * r[:, None]
    if ROUNDS:
        y = y.to(result.dtype.element_ty).to(tl.float32)
    if WEIGHTED:
        y *= tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :] + offset
    tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "offset"])
def _norm_gradient(
    values,
    weight,
    inverse,
    upstream,
    to_values,
    to_weight,
    rows,
    size,
    offset,
    WEIGHTED: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program, step = tl.program_id(0).to(tl.int64), tl.num_programs(0) * ROWS
    columns = tl.arange(0, BLOCK)
    if WEIGHTED:
        w = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :] + offset
        total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = program * ROWS
    while first < rows:  # Triton's interpreter has no run-time `for` from numpy 2.4 on
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < size)[None, :]
        at = row[:, None] * size + columns[None, :]
        r = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            x = tl.where(inside, x - tl.sum(x, axis=1)[:, None] / size, 0.0)
        x *= r
        if WEIGHTED:
            total += d * x
            d *= w
        if CENTRED:
            d -= tl.sum(d, axis=1)[:, None] / size
        along = tl.sum(d * x, axis=1)[:, None] / size
        tl.store(to_values + at, ((d - x * along) * r).to(to_values.dtype.element_ty), mask=inside)
        first += step
    if WEIGHTED:
        tl.store(to_weight + program * size + columns, tl.sum(total, axis=0), mask=columns < size)


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """The norm of the rows x (size,) of ``values``, with the weight w (size,), to which ``offset`` is added.

    Forward, for each row, with m its mean if the norm is centred, else 0::

        r = 1 / sqrt(mean((x - m) ** 2) + epsilon)
        n = (x - m) * r, rounded to the type of x if the variant says so
        y = n * (w + offset)

    It keeps r, one fp32 number a row.

    Backward, for each row, with the upstream gradient d (size,) of y, ``g = d * (w + offset)``, and without rounding::

        dx = r * (g - c - n * mean(g * n)), c = mean(g) if the norm is centred, else 0
        dw = sum over all rows of d * n

    Each program sums dw over its own rows in fp32; torch adds the programs' sums, (programs, size), at the end.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor | None, epsilon: float, variant: Variant) -> Tensor:
        result = torch.empty_like(values)
        size = values.shape[-1]
        rows = values.numel() // size
        inverse = torch.empty(rows, dtype=torch.float32, device=values.device)
        blocks = _blocks(size)
        constants = {"WEIGHTED": weight is not None, "CENTRED": variant.centred, "ROUNDS": variant.rounds, **blocks}
        tensors = values, values if weight is None else weight, result, inverse
        grid = (triton.cdiv(rows, blocks["ROWS"]),)
        launch(_norm, grid, *tensors, rows, size, epsilon, variant.offset, **constants)
        ctx.save_for_backward(values, weight, inverse)
        ctx.how = epsilon, variant
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (values, weight, inverse), variant = ctx.saved_tensors, ctx.how[1]
        if differentiation.goes_by_torch(upstream):
            found = differentiation.gradients(lambda x, w: norm_torch.norm(x, w, *ctx.how), upstream, values, weight)
            return *found, None, None
        to_values = torch.empty_like(values)
        size, rows = values.shape[-1], inverse.numel()
        blocks = _blocks(size)
        programs = min(PROGRAMS, triton.cdiv(rows, blocks["ROWS"]))
        sums = inverse if weight is None else torch.empty(programs, size, dtype=torch.float32, device=values.device)
        tensors = values, values if weight is None else weight, inverse, upstream.contiguous(), to_values, sums
        constants = {"WEIGHTED": weight is not None, "CENTRED": variant.centred, **blocks}
        launch(_norm_gradient, (programs,), *tensors, rows, size, variant.offset, **constants)
        wanted = ctx.needs_input_grad[1]  # not if the norm is frozen, as with LoRA
        return to_values, sums.sum(0).to(weight.dtype) if wanted else None, None, None


@functools.cache
def _blocks(size: int) -> dict[str, int]:
    """Return how many rows a program takes, and its warps: 16 elements for each of their threads."""
    block = triton.next_power_of_2(size)
    rows = max(1, BLOCK // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}
