"""The gate of an MLP, ``activation(gate) * up``, in Triton, forward and backward.

FlagGems has one for SiLU, but on an H100 it is slower than torch's separate operators: 0.85 against 0.69 ms, forward
and backward, for 8,192 x 8,192 in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_fl_overlay.kernels import differentiation, gate_torch
from verl_fl_overlay.kernels.launch import launch

BLOCK = 1024
"""The most elements that a program holds."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``, rounded once, with gradients.

    Args:
        gate: any shape, bf16, fp16 or fp32.
        up: of the same shape and type.
        activation: one of ``gate_torch.ACTIVATIONS``.
    """
    result: Tensor = _Gated.apply(gate.contiguous(), up.contiguous(), activation)
    return result


def gated_halves(gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    """Return the same for the halves of the last dimension, (..., 2 * size) -> (..., size); no half is copied.

    Args:
        gate_up: (..., 2 * size), bf16, fp16 or fp32.
        activation: one of ``gate_torch.ACTIVATIONS``.
        gate_first: the first half is the gate.
    """
    result: Tensor = _GatedHalves.apply(gate_up.contiguous(), activation, gate_first)
    return result


@triton.jit
def _slope(g, ACTIVATION: tl.constexpr):  # noqa: ANN202
    """Return s and its derivative, for an activation that is g * s."""
    if ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = tl.sigmoid(g)
        slope = s * (1 - s)
    return s, slope


@triton.jit(do_not_specialize=["blocks"])
def _gate(gate, up, result, stride, width, blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr) -> None:
    program = tl.program_id(0).to(tl.int64)
    row, columns = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gate + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    s, _ = _slope(g, ACTIVATION)
    tl.store(result + row * width + columns, (g * s * u).to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _gate_gradient(
    gate, up, upstream, to_gate, to_up, stride, width, blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    program = tl.program_id(0).to(tl.int64)
    row, columns = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * stride + columns
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(upstream + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    s, slope = _slope(g, ACTIVATION)
    tl.store(to_gate + at, (d * u * (s + g * slope)).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (d * g * s).to(to_up.dtype.element_ty), mask=inside)


class _Gated(torch.autograd.Function):  # type: ignore[misc]
    """The product of activation(g) and u, element by element.

    Forward: ``y = g * s(g) * u`` with::

        silu:       s = sigmoid(g)
        gelu:       s = (1 + erf(g / sqrt(2))) / 2
        gelu_tanh:  s = sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 * g ** 3))

    since (1 + tanh(z)) / 2 is sigmoid(2 * z).  It keeps g and u, and no activation.

    Backward, with the upstream gradient d of y (all of one shape)::

        dg = d * u * (s + g * ds/dg)
        du = d * g * s
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        result = torch.empty_like(gate)
        _launch(_gate, gate, up, result, width=gate.numel(), stride=gate.numel(), activation=activation)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if differentiation.goes_by_torch(upstream):
            return *differentiation.gradients(
                lambda g, u: gate_torch.gated(g, u, ctx.activation), upstream, gate, up
            ), None
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = gate, up, upstream.contiguous(), to_gate, to_up
        _launch(_gate_gradient, *tensors, width=gate.numel(), stride=gate.numel(), activation=ctx.activation)
        return to_gate, to_up, None


class _GatedHalves(torch.autograd.Function):  # type: ignore[misc]
    """The same product for g and u side by side in one tensor; its gradient is one tensor too, (..., 2 * size)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.how = activation, gate_first
        width = gate_up.shape[-1] // 2
        result = gate_up.new_empty(*gate_up.shape[:-1], width)
        _launch(_gate, *_halves(gate_up, gate_first), result, width=width, stride=2 * width, activation=activation)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,), (activation, gate_first) = ctx.saved_tensors, ctx.how
        if differentiation.goes_by_torch(upstream):
            return (
                *differentiation.gradients(lambda both: gate_torch.gated_halves(both, *ctx.how), upstream, gate_up),
                None,
                None,
            )
        to_both, width = torch.empty_like(gate_up), upstream.shape[-1]
        tensors = *_halves(gate_up, gate_first), upstream.contiguous(), *_halves(to_both, gate_first)
        _launch(_gate_gradient, *tensors, width=width, stride=2 * width, activation=activation)
        return to_both, None, None


def _halves(gate_up: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = gate_up.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _launch(kernel: Any, gate: Tensor, *tensors: Tensor, width: int, stride: int, activation: str) -> None:
    """Launch for rows of ``width`` elements that begin ``stride`` apart in gate and up; results have no gaps."""
    block = min(BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    grid = (gate.numel() // width * blocks,)
    constants = {"ACTIVATION": activation, "BLOCK": block, "num_warps": max(1, block // 256)}
    launch(kernel, grid, gate, *tensors, stride, width, blocks, **constants)
