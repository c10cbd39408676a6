"""MLPs with a gate: how one is recognised, the kernel for its gate, and the native code for the check.

Gate and up are two projections (Llama, Mixtral) or the halves of one (Phi-3, GLM-4).  Which projection is which, and
which activation the gate has, the check finds out, so no names of children matter.  MLPs with another activation, a
clamp, a factor or a dropout look alike.  The samples tell them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import gate_torch, state
from verl_fl_overlay.kernels.agreement import (
    TOLERANCE,
    Agreement,
    DiffersError,
    Pair,
    Samples,
    kernels_take,
    nearest,
)

METHOD = "forward"
"""The method of an MLP that runs its gate on the kernel: (..., hidden) -> (..., hidden)."""

SCALES = (0.1, 0.5, 1, 1, 2, 5, 40)
"""Magnitudes of the samples' rows: activations differ most around 1, and large values show a clamp."""

Projections = tuple[str, ...]
"""The names of the children (gate, up, down), or (gate and up, down)."""


class Variant(NamedTuple):
    """How an MLP computes, down(activation(gate(x)) * up(x)).

    Attributes:
        activation: one of ``gate_torch.ACTIVATIONS``.
        gate_first: the gate is the first half, where one projection gives both.
        projections: which child is which; () for experts, which have parameters instead.
    """

    activation: str
    gate_first: bool = True
    projections: Projections = ()


def recognise(module: Any) -> tuple[Projections, ...]:
    """Return every way in which the children of ``module`` may be an MLP's projections, () if it is no gated MLP.

    Two projections of one size go into a third, or one of twice the size into a second.  Other children have no
    weights, and the module itself has none.
    """
    children = module._modules
    linear = {name: (child.in_features, child.out_features) for name, child in children.items() if _is_linear(child)}
    weighted = [name for name, child in children.items() if name not in linear and any(True for _ in _weights(child))]
    if len(linear) not in (2, 3) or weighted or any(True for _ in _weights(module, recurse=False)):
        return ()
    return tuple(names for names in itertools.permutations(linear) if _fit(*(linear[name] for name in names)))


def _is_linear(module: Any) -> bool:
    return all(type(getattr(module, size, None)) is int for size in ("in_features", "out_features"))


def _weights(module: Any, recurse: bool = True) -> Iterator[Tensor]:
    yield from () if module is None else itertools.chain(module.parameters(recurse), module.buffers(recurse))


def _fit(*sizes: tuple[int, int]) -> bool:
    """Whether these (in, out) may be those of gate, up and down, or of gate and up in one, and down."""
    *first, (inner, _) = sizes
    return len({size for size, _ in first}) == 1 and all(out * len(first) == 2 * inner for _, out in first)


def in_place_of(native: Callable[..., Any], agreement: Agreement) -> Callable[[Any, Any, Tensor], Tensor | None]:
    """Return what computes an MLP's forward ``native`` with the kernel, or returns None where native has to run.

    The projections run unchanged, also quantised or with adapters.  The kernel works element by element, so the sizes
    of a module do not matter and are not in the key.
    """
    from verl_fl_overlay.kernels.triton.gate import gated, gated_halves

    def run(self: Any, structure: tuple[Projections, ...], values: Tensor) -> Tensor | None:
        if not kernels_take(values):
            return None
        device, modules = values.device, self._modules
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else values.dtype
        others = [state.of(module) for name, module in modules.items() if name not in structure[0]]
        key = ("gated_mlp", type(self), dtype, structure, state.of_module(self), *others)
        variant = agreement.variant(key, device, _pair, self, native, structure, device, gated, gated_halves)
        if variant is None:
            return None
        activation, gate_first, (*into, down) = variant
        made = [modules[name](values) for name in into]
        ours = kernels_take(*made) and (made[0].dtype, made[0].shape) == (made[-1].dtype, made[-1].shape)
        result: Tensor
        if len(made) == 1:
            ours = ours and made[0].shape[-1] % 2 == 0
            result = (gated_halves if ours else gate_torch.gated_halves)(made[0], activation, gate_first)
        else:
            result = (gated if ours else gate_torch.gated)(made[0], made[1], activation)
        return modules[down](result)

    return run


def variant_of(
    native: Callable[[Tensor, Tensor, Variant], Tensor], variants: list[Variant], samples: Samples, device: torch.device
) -> Variant:
    """Return which of ``variants`` the gate of native code is.

    This is found in fp32, in which activations that are alike, such as GELU and its approximation, differ enough.

    Args:
        native: computes, from gate and up of one shape, what it computes if it is the variant that it is given.
        variants: those that are possible.
        samples: where gate and up come from.
        device: where native runs.

    Raises:
        DiffersError: it is none of them.
    """
    gate, up = (samples.rows(SCALES, 96).to(device) for _ in range(2))
    with torch.no_grad():
        results = [(each, native(gate, up, each), gate_torch.gated(gate, up, each.activation)) for each in variants]
    variant: Variant
    variant, off = nearest(results)
    if not off <= TOLERANCE[torch.float32]:  # NaN is not
        raise DiffersError(f"its gate differs by {off:.2g} from {variant.activation}, the nearest that has a kernel")
    return variant


def halves(gate: Tensor, up: Tensor, gate_first: bool) -> Tensor:
    """Return gate and up, (..., size) each, as the halves of one tensor (..., 2 * size)."""
    return torch.cat((gate, up) if gate_first else (up, gate), -1)


def _pair(
    samples: Samples,
    mlp: Any,
    forward: Callable[..., Tensor],
    structure: tuple[Projections, ...],
    device: torch.device,
    kernel: Callable[..., Tensor],
    kernel_of_halves: Callable[..., Tensor],
) -> Pair:
    def run(values: Tensor, projections: Projections, modules: Iterable[nn.Module]) -> Tensor:
        children = mlp._modules | dict(zip(projections, modules, strict=True))
        return state.run_natively(mlp, lambda probe: forward(probe, values), _modules=children)

    def gate_alone(gate: Tensor, up: Tensor, variant: Variant) -> Tensor:
        two = len(variant.projections) == 2
        into = [halves(gate, up, variant.gate_first)] if two else [gate, up]
        return run(gate, variant.projections, [*map(_Constant, into), nn.Identity()])

    variants = [
        Variant(activation, gate_first, projections)
        for projections in structure
        for activation in gate_torch.ACTIVATIONS
        for gate_first in ((True, False) if len(projections) == 2 else (True,))
    ]
    variant = variant_of(gate_alone, variants, samples, device)

    def native(values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return (run(values, variant.projections, map(_linear, weights)),)

    def fused(values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        *into, down = weights
        made = [nn.functional.linear(values, weight) for weight in into]
        how = (variant.activation, variant.gate_first) if len(made) == 1 else (variant.activation,)
        result = (kernel_of_halves if len(made) == 1 else kernel)(*made, *how)
        return (nn.functional.linear(result, down),)

    hidden, inner = 64, 96
    outs = (2 * inner,) if len(variant.projections) == 2 else (inner, inner)
    weights = [samples.normal(out, hidden) / 8 for out in outs]
    return (samples.rows(SCALES, hidden), *weights, samples.normal(hidden, inner) / 8), native, fused, variant


class _Constant(nn.Module):  # type: ignore[misc]
    """Stands for a projection whose result is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, values: Tensor) -> Tensor:
        return self.value.clone()  # an activation may work in place


def _linear(weight: Tensor) -> nn.Module:
    """Return a linear module with the tensor ``weight`` itself, so that the tensor gets the gradient."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    del linear.weight
    linear.weight = weight
    return linear
