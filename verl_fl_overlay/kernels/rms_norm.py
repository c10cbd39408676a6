"""RMS norms and layer norms without a bias: how one is recognised, the kernel in its place, native code for the check.

The weight may be kept as it is, as its distance from 1 (Gemma), or be left out; which of these a norm is, the check
finds out.  A norm of groups or of a part of a row, and a norm that clamps look alike.  The samples tell them apart.
torch's own ``nn.LayerNorm`` stays, since it is one kernel already; what models write by hand is up to eight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import norm_torch, state
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, kernels_take, nearest

METHOD = "forward"
"""The method of a norm that runs on the kernel: (..., size) -> (..., size)."""

EPSILON = ("variance_epsilon", "eps")
"""The names that norms use for the number that they add to the mean of the squares."""

NOT_STATE = state.TORCH_S_OWN | {"weight"}
"""Not in the key: FSDP1 keeps the weight as an attribute; it is the kernel's input."""


def recognise(module: Any) -> bool:
    """Whether ``module`` has the structure of a norm: an epsilon, and no parameter but perhaps a weight (size,)."""
    if module._modules or epsilon(module) is None or isinstance(module, nn.LayerNorm):
        return False
    weight = getattr(module, "weight", None)  # FSDP1 keeps it as a plain tensor, not as a parameter
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != "weight"]
    shaped = weight is None or getattr(weight, "ndim", 0) == 1
    return shaped and not others and getattr(module, "bias", None) is None


def epsilon(module: Any) -> float | None:
    """Return what a norm adds to the mean of the squares, under one of its usual names; None if it has none."""
    for name in EPSILON:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def in_place_of(native: Callable[..., Any], agreement: Agreement) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """Return what computes a norm's forward ``native`` with the kernel, or returns None where native has to run."""
    from verl_fl_overlay.kernels.triton.rms_norm import norm

    def run(self: Any, structure: Any, values: Tensor) -> Tensor | None:
        weight, added = getattr(self, "weight", None), epsilon(self)
        inputs = (values,) if weight is None else (values, weight)
        if added is None or not kernels_take(*inputs) or (weight is not None and weight.shape != values.shape[-1:]):
            return None
        types = tuple([each.dtype for each in inputs])
        key = ("rms_norm", type(self), *types, values.shape[-1:], state.of_module(self, NOT_STATE))
        variant = agreement.variant(key, values.device, _pair, self, native, values, added, norm)
        return None if variant is None else norm(values, weight, added, variant)

    return run


def _pair(
    samples: Samples,
    module: Any,
    forward: Callable[..., Tensor],
    like: Tensor,
    added: float,
    kernel: Callable[..., Tensor],
) -> Pair:
    own: Tensor | None = getattr(module, "weight", None)

    def typed(weight: tuple[Tensor, ...]) -> Tensor | None:
        return None if own is None else weight[0].to(own.dtype)

    def native(values: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
        return (state.run_natively(module, lambda probe: forward(probe, values), weight=typed(weight)),)

    def fused(values: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
        return (kernel(values, typed(weight), added, variant),)

    # A mean shows a layer norm.  A row so small that epsilon counts shows where epsilon is added.  A large row shows a
    # clamp.  Columns of different magnitudes show a norm of groups or of a part of the columns.
    size = like.shape[-1]
    columns = torch.logspace(-1, 1, size)
    columns *= size**0.5 / columns.norm()
    values = samples.rows((1, 1, 1, max(math.sqrt(added), 1e-3), 0.1, 30, 1000), size) * columns
    weight = () if own is None else (samples.normal(*own.shape) + 0.5,)
    with torch.no_grad():
        row, *rest = (each.to(like) for each in (values, *weight))
        (expected,) = native(row, *rest)
        results = [norm_torch.norm(row, typed(tuple(rest)), added, each) for each in norm_torch.VARIANTS]
    variant, _ = nearest((each, expected, result) for each, result in zip(norm_torch.VARIANTS, results, strict=True))
    return (values, *weight), native, fused, variant
