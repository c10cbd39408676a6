"""Experts whose weights are 3-D parameters: their gate, where a method of its own computes it for all experts at once.

transformers 5 keeps the experts of most models so.  Gate and up of a token are the halves of one product; interleaved
ones (gpt-oss) and clamped ones look alike, and stay native.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels import gate_torch, state
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, kernels_take
from verl_fl_overlay.kernels.gated_mlp import SCALES, Variant, halves, variant_of

METHOD = "_apply_gate"
"""The method that runs on the kernel: (tokens, 2 * size) -> (tokens, size)."""


def recognise(module: Any) -> bool:
    """Whether ``module`` has the method; FSDP1 leaves no parameters of three dimensions to go by."""
    return callable(getattr(module, METHOD, None))


def in_place_of(native: Callable[..., Any], agreement: Agreement) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """Return what computes the gate ``native`` with the kernel, or returns None where native has to run."""
    from verl_fl_overlay.kernels.triton.gate import gated_halves

    def run(self: Any, structure: Any, gate_up: Tensor) -> Tensor | None:
        if not kernels_take(gate_up) or gate_up.shape[-1] % 2:
            return None
        children = map(state.of, self._modules.values())
        key = ("experts", type(self), gate_up.dtype, state.of_module(self), *children)
        variant = agreement.variant(key, gate_up.device, _pair, self, native, gate_up.device, gated_halves)
        return None if variant is None else gated_halves(gate_up, variant.activation, variant.gate_first)

    return run


def _pair(
    samples: Samples,
    experts: Any,
    method: Callable[..., Tensor],
    device: torch.device,
    kernel: Callable[..., Tensor],
) -> Pair:
    def run(gate_up: Tensor) -> Tensor:
        return state.run_natively(experts, lambda probe: method(probe, gate_up))

    def gate_alone(gate: Tensor, up: Tensor, variant: Variant) -> Tensor:
        return run(halves(gate, up, variant.gate_first))

    variants = [Variant(activation, first) for activation in gate_torch.ACTIVATIONS for first in (True, False)]
    variant = variant_of(gate_alone, variants, samples, device)

    def native(gate_up: Tensor) -> tuple[Tensor, ...]:
        return (run(gate_up),)

    def fused(gate_up: Tensor) -> tuple[Tensor, ...]:
        return (kernel(gate_up, variant.activation, variant.gate_first),)

    return (samples.rows(SCALES, 2 * 96),), native, fused, variant
