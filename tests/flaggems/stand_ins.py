"""A small operator set on the CPU's dispatch key, in the three ways FlagGems implements operators.

They go through the same code as FlagGems' own: only ``library.load`` is answered with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch

from verl_fl_overlay.flaggems.library import FlagGems, Kernel

calls: Counter[str] = Counter()


class Launched:
    """Like a triton kernel: computes on memory, and autograd sees nothing of it."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute

    def __call__(self, *operands: Any) -> torch.Tensor:
        dtype = torch.result_type(*operands[-2:])
        arrays = [o.data.to(torch.float32).numpy() if isinstance(o, torch.Tensor) else o for o in operands]
        result = torch.from_numpy(numpy.asarray(self._compute(*arrays), "float32"))
        return result.to(dtype)


multiply = Launched(lambda a, b: a * b)
multiply_matrices = Launched(lambda a, b: a @ b)
divide = Launched(lambda a, b: a / b)
where_launched = Launched(numpy.where)


def mul(a: Any, b: Any) -> torch.Tensor:
    calls["mul"] += 1
    return multiply(a, b)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    calls["mm"] += 1
    return multiply_matrices(a, b)


def true_divide(a: Any, b: Any) -> torch.Tensor:
    calls["true_divide"] += 1
    return divide(a if a.is_floating_point() else a.float(), b)


def where_scalar_other(condition: torch.Tensor, a: torch.Tensor, b: float) -> torch.Tensor:
    calls["where_scalar_other"] += 1
    return where_launched(condition, a, b).to(a.dtype)


def where_self(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    calls["where_self"] += 1
    return where_launched(condition, a, b).to(torch.promote_types(a.dtype, b.dtype))


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        scale = torch.rsqrt(multiply(x, x).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return multiply(multiply(x, scale), weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        inner = grad * weight
        along = (inner * normal).mean(-1, keepdim=True)
        return scale * (inner - normal * along), None, (grad * normal).reshape(-1, weight.numel()).sum(0), None


def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    calls["rms_norm"] += 1
    return RmsNorm.apply(x, shape, weight, eps)


def hstack(tensors: list[torch.Tensor]) -> torch.Tensor:
    calls["hstack"] += 1
    return torch.cat(tensors, dim=1 if tensors[0].dim() > 1 else 0)


KERNELS = tuple(
    Kernel(key, function, ("CPU",))
    for key, function in {
        "mul.Tensor": mul,
        "mm": mm,
        "div.Tensor": true_divide,
        "true_divide.Tensor": true_divide,
        "where.self": where_self,
        "where.ScalarOther": where_scalar_other,
        "rms_norm": rms_norm,
        "hstack": hstack,
    }.items()
)


def gems(*kernels: Kernel) -> FlagGems:
    """Return the stand-ins as an installed FlagGems."""
    return FlagGems("5.0.0", "stand-in", kernels or KERNELS)
