"""The gate of an MLP, ``silu(gate) * up``, in Triton, forward and backward.

FlagGems has one too, but on an H100 it is slower than torch's separate operators: 0.85 against 0.69 ms, forward and
backward, for 8,192 x 8,192 in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_fl_overlay.kernels.launch import launch

BLOCK = 1024
"""Elements that a program holds."""


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, rounded once, with gradients.

    Args:
        gate: any shape, bf16, fp16 or fp32.
        up: of the same shape and type.
    """
    result: Tensor = _SiluAndMul.apply(gate, up)
    return result


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
    """The product of silu(g) and u, element by element.

    Forward, with ``s = 1 / (1 + exp(-g))``: ``y = g * s * u``.  It keeps g and u, and no silu.

    Backward, with the upstream gradient d of y (all of one shape)::

        dg = d * u * s * (1 + g * (1 - s))
        du = d * g * s
    """

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
