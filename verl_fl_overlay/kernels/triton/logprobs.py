"""Statistics of a matrix of logits with two Triton kernels: logits are read once forward, once backward.

Formulas and arguments are those of ``kernels.logprobs_torch``, without fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from verl_fl_overlay.kernels.launch import launch
from verl_fl_overlay.kernels.tokens import Statistics, Upstream

BLOCK = 4096
"""Logits that a program holds at a time."""

WARPS = 4


@triton.jit
def _forward(
    logits,
    labels,
    inverse,
    normalizer,
    log_probs,
    entropy,
    squares,
    stride,
    vocabulary,
    SCALED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label < 0:
        tl.store(normalizer + row, 0.0)
        tl.store(log_probs + row, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        if SQUARES:
            tl.store(squares + row, 0.0)
    else:
        logits += row * stride
        columns = tl.arange(0, BLOCK)
        # One maximum for the whole block is 15 % faster: it costs a reduction, one for each lane costs an exponential
        # more.
        most = float("-inf")
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - most) * (z - most)
        doubled = tl.zeros([BLOCK], tl.float32)
        scale = 1.0
        if SCALED:
            scale = tl.load(inverse + row)
        first = 0
        while first < vocabulary:
            inside = first + columns < vocabulary
            values = tl.load(logits + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if SCALED:
                values = values * scale
            larger = tl.maximum(most, tl.max(values, axis=0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            below = values - shift
            exponentials, decay = tl.exp(below), tl.exp(most - shift)
            if ENTROPY:
                step = tl.where(most == float("-inf"), 0.0, most - shift)
                weighted = (weighted + total * step) * decay
                weighted += tl.where(exponentials > 0, exponentials * below, 0.0)  # 0 * log(0) is 0
            if SQUARES:
                doubled = doubled * decay * decay + exponentials * exponentials
            total = total * decay + exponentials
            most = larger
            first += BLOCK
        whole = tl.sum(total, axis=0)
        log_sum = tl.log(whole)
        picked = tl.load(logits + label).to(tl.float32)
        if SCALED:
            picked = picked * scale
        tl.store(log_probs + row, (picked - most) - log_sum)
        tl.store(normalizer + row, most + log_sum)
        if ENTROPY:
            tl.store(entropy + row, log_sum - tl.sum(weighted, axis=0) / whole)
        if SQUARES:
            tl.store(squares + row, tl.sum(doubled, axis=0) / (whole * whole))


@triton.jit
def _backward(
    logits,
    labels,
    inverse,
    normalizer,
    entropy,
    squares,
    to_log_probs,
    to_entropy,
    to_squares,
    gradient,
    stride,
    gradient_stride,
    vocabulary,
    SCALED: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    gradient += row * gradient_stride
    log_sum_exp = tl.load(normalizer + row)
    d, h, s, weight = 0.0, 0.0, 0.0, 0.0
    if LOG_PROBS:
        d = tl.load(to_log_probs + row).to(tl.float32)
        weight += tl.abs(d)
    if ENTROPY:
        h = tl.load(to_entropy + row).to(tl.float32)
        weight += tl.abs(h)
    if SQUARES:
        s = tl.load(to_squares + row).to(tl.float32)
        weight += tl.abs(s)
    # A masked token's gradient is zero, unless its logits hold NaN or infinity, so its logits need not be read.
    if (weight == 0.0) & (tl.abs(log_sum_exp) < float("inf")):
        tl.store(gradient + columns, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=inside)
    else:
        values = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0
        if SCALED:
            scale = tl.load(inverse + row)
            values = values * scale
        logs = values - log_sum_exp
        p = tl.exp(logs)
        change = -p * d
        change = tl.where(columns == tl.load(labels + row), change + d, change)
        if ENTROPY:
            of_entropy = h * p * (logs + tl.load(entropy + row))
            change -= tl.where(h == 0.0, 0.0, tl.where(p == 0.0, 0.0, of_entropy))
        if SQUARES:
            change += 2 * s * p * (p - tl.load(squares + row))
        if SCALED:
            change = change * scale
        tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=inside)


def forward(logits: Tensor, labels: Tensor, inverse: Tensor | None, result: Statistics) -> None:
    """Write the statistics of each row."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    logits = _unit_columns(logits)
    unused = result.normalizer
    tensors = logits, labels, *(unused if each is None else each for each in (inverse, *result))
    flags = {
        "SCALED": inverse is not None,
        "ENTROPY": result.entropy is not None,
        "SQUARES": result.squares is not None,
    }
    launch(_forward, (rows,), *tensors, logits.stride(0), vocabulary, **flags, BLOCK=BLOCK, num_warps=WARPS)


def backward(
    logits: Tensor, labels: Tensor, inverse: Tensor | None, kept: Statistics, upstream: Upstream, gradient: Tensor
) -> None:
    """Write the gradient of the logits."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    logits, target = _unit_columns(logits), _unit_columns(gradient)
    unused = kept.normalizer
    given = inverse, kept.normalizer, kept.entropy, kept.squares, *upstream
    tensors = logits, labels, *(unused if each is None else each for each in given), target
    flags = {
        "SCALED": inverse is not None,
        "LOG_PROBS": upstream.log_probs is not None,
        "ENTROPY": upstream.entropy is not None and kept.entropy is not None,
        "SQUARES": upstream.squares is not None and kept.squares is not None,
    }
    grid, sizes = (rows, triton.cdiv(vocabulary, BLOCK)), (logits.stride(0), target.stride(0), vocabulary)
    launch(_backward, grid, *tensors, *sizes, **flags, BLOCK=BLOCK, num_warps=WARPS)
    if target is not gradient:
        gradient.copy_(target)


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
