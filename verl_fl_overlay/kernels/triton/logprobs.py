"""Token log-probs of a matrix of logits with two Triton kernels: logits are read once forward, once backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from verl_fl_overlay.kernels.launch import launch

BLOCK = 4096
"""Logits that a program holds at a time."""

WARPS = 4


@triton.jit
def _forward(logits, labels, result, normalizer, stride, vocabulary, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    # One maximum for the whole block is 15 % faster: it costs a reduction, one for each lane costs an exponential more.
    most = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        inside = first + columns < vocabulary
        values = tl.load(logits + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(values, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.exp(values - shift)
        most = larger
    log_sum = tl.log(tl.sum(total, axis=0))
    picked = tl.load(logits + tl.load(labels + row)).to(tl.float32)
    tl.store(result + row, (picked - most) - log_sum)
    tl.store(normalizer + row, most + log_sum)


@triton.jit
def _backward(
    logits, labels, normalizer, upstream, gradient, stride, gradient_stride, vocabulary, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    gradient += row * gradient_stride
    scale = tl.load(upstream + row).to(tl.float32)
    log_sum_exp = tl.load(normalizer + row)
    # A masked token's gradient is zero, unless its logits hold NaN or infinity, so its logits need not be read.
    if (scale == 0.0) & (tl.abs(log_sum_exp) < float("inf")):
        tl.store(gradient + columns, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=inside)
    else:
        values = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        change = -tl.exp(values - log_sum_exp) * scale
        change = tl.where(columns == tl.load(labels + row), change + scale, change)
        tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=inside)


def forward(logits: Tensor, labels: Tensor, result: Tensor, normalizer: Tensor) -> None:
    """Write each row's log-prob and log-sum-exp; formula and arguments as in ``logprobs_torch.forward``, no fp64."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    logits = _unit_columns(logits)
    sizes = logits.stride(0), vocabulary
    launch(_forward, (rows,), logits, labels, result, normalizer, *sizes, BLOCK=BLOCK, num_warps=WARPS)


def backward(logits: Tensor, labels: Tensor, normalizer: Tensor, upstream: Tensor, gradient: Tensor) -> None:
    """Write the gradient of the logits; formula and arguments as in ``logprobs_torch.backward``, no fp64.

    With a row's logits z (vocabulary,), its log-sum-exp n, its label and the upstream gradient d of its log-prob, the
    gradient of logit i is ``d * ((1 if i is the label else 0) - exp(z[i] - n))``.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return
    logits, target = _unit_columns(logits), _unit_columns(gradient)
    grid, tensors = (rows, triton.cdiv(vocabulary, BLOCK)), (logits, labels, normalizer, upstream, target)
    sizes = logits.stride(0), target.stride(0), vocabulary
    launch(_backward, grid, *tensors, *sizes, BLOCK=BLOCK, num_warps=WARPS)
    if target is not gradient:
        gradient.copy_(target)


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
