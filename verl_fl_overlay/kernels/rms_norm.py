"""RMS norms: how one is recognised, the kernel in its place, and the native code for the check.

A layer norm, a norm of groups or of a part of a row, and a norm that clamps look alike.  The samples tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels import state
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, kernels_take

EPSILON = ("variance_epsilon", "eps")
"""The names that norms use for the number that they add to the mean of the squares."""

NOT_STATE = state.TORCH_S_OWN | {"forward", "weight"}
"""Not in the key: the forward is ours, and the weight, which FSDP1 keeps as an attribute, is the kernel's input."""


def recognise(module: Any) -> bool:
    """Whether ``module`` has the structure of an RMS norm: a weight (size,), an epsilon, and no other parameter."""
    weight = getattr(module, "weight", None)  # FSDP1 keeps it as a plain tensor, not as a parameter
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != "weight"]
    alone = not others and not module._modules and getattr(module, "bias", None) is None
    return alone and getattr(weight, "ndim", 0) == 1 and epsilon(module) is not None


def epsilon(module: Any) -> float | None:
    """Return what a norm adds to the mean of the squares, under one of its usual names; None if it has none."""
    for name in EPSILON:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def forward(agreement: Agreement) -> Callable[..., Any]:
    """Return the replacement for a norm's forward: (..., size) -> (..., size)."""
    from verl_fl_overlay.kernels.triton.rms_norm import rms_norm

    def forward(self: Any, *inputs: Tensor, **named: Tensor) -> Any:
        if not torch.compiler.is_compiling() and len(inputs) == 1 and not named:
            (values,), weight, added = inputs, self.weight, epsilon(self)
            if added is not None and weight.dtype == values.dtype and kernels_take(values, weight):
                key = ("rms_norm", type(self), values.dtype, weight.shape, state.of_module(self, NOT_STATE))
                if agreement.agree(key, values.device, _pair, self, added, rms_norm):
                    return rms_norm(values, weight, added)
        return type(self).forward(self, *inputs, **named)

    return forward


def _pair(samples: Samples, norm: Any, added: float, kernel: Callable[..., Tensor]) -> Pair:
    def native(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (state.run_natively(norm, lambda probe: type(norm).forward(probe, values), weight=weight),)

    def fused(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (kernel(values, weight, added),)

    (size,) = norm.weight.shape
    # A mean shows a layer norm.  A row so small that epsilon counts shows where epsilon is added.  A large row shows a
    # clamp.  Columns of different magnitudes show a norm of groups or of a part of the columns.
    columns = torch.logspace(-1, 1, size)
    columns *= size**0.5 / columns.norm()
    values = samples.rows((1, 1, 1, max(math.sqrt(added), 1e-3), 0.1, 30, 1000), size) * columns
    return (values, samples.normal(size) + 0.5), native, fused
