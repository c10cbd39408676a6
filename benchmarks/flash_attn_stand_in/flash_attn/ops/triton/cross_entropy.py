"""Cross entropy with Triton in flash-attn's way: logits are read once forward, and once backward in their own place.

verl takes its log-probs from here where it finds flash-attn.  Blocks and warps are as many as flash-attn takes for a
large vocabulary, so that the rows of the benchmark named after it are no slower than with that package.
"""

# ruff: noqa: ANN001, N803  a Triton kernel's arguments are pointers and compile-time constants

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(logits, labels, losses, normalizers, stride, columns, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    offsets = tl.arange(0, BLOCK)
    most = float("-inf")
    total = 0.0
    for first in range(0, columns, BLOCK):
        inside = first + offsets < columns
        values = tl.load(logits + first + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(values, axis=0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(values - larger), axis=0)
        most = larger
    normalizer = most + tl.log(total)
    picked = tl.load(logits + tl.load(labels + row)).to(tl.float32)
    tl.store(losses + row, normalizer - picked)
    tl.store(normalizers + row, normalizer)


@triton.jit
def _backward(
    gradient, logits, labels, normalizers, upstream, gradient_stride, stride, columns, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(logits + row * stride + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    change = tl.exp(values - tl.load(normalizers + row))
    change = tl.where(offsets == tl.load(labels + row), change - 1.0, change) * tl.load(upstream + row)
    tl.store(gradient + row * gradient_stride + offsets, change.to(gradient.dtype.element_ty), mask=inside)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, inplace_backward: bool) -> Tensor:
        logits, labels = logits if logits.stride(-1) == 1 else logits.contiguous(), labels.contiguous()
        rows, columns = logits.shape
        losses, normalizers = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
        block = min(triton.next_power_of_2(columns), 16384)
        sizes = logits.stride(0), columns
        _forward[(rows,)](logits, labels, losses, normalizers, *sizes, BLOCK=block, num_warps=16)
        ctx.save_for_backward(logits, labels, normalizers)
        ctx.inplace = inplace_backward
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normalizers = ctx.saved_tensors
        gradient = logits if ctx.inplace else torch.empty_like(logits)
        rows, columns = logits.shape
        block = min(triton.next_power_of_2(columns), 4096)
        grid, tensors = (rows, triton.cdiv(columns, block)), (gradient, logits, labels, normalizers)
        sizes = gradient.stride(0), logits.stride(0), columns
        _backward[grid](*tensors, upstream.contiguous(), *sizes, BLOCK=block, num_warps=8)
        return gradient, None, None


def cross_entropy_loss(logits: Tensor, labels: Tensor, inplace_backward: bool = False) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and its z-loss, which is zero here."""
    losses = _CrossEntropy.apply(logits, labels, inplace_backward)
    return losses, torch.zeros_like(losses)
