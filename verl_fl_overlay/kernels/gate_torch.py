"""The gates of MLPs with torch's operators: they name the activation that a model has, and give second gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}
"""The activations that the kernel has, by the names that it knows them by."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``, each of any shape and floating type."""
    return ACTIVATIONS[activation](gate) * up


def gated_halves(gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    """Return the same for the halves of the last dimension, (..., 2 * size) -> (..., size)."""
    first, second = gate_up.chunk(2, -1)
    return gated(first, second, activation) if gate_first else gated(second, first, activation)
