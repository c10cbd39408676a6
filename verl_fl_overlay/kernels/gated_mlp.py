"""MLPs gated by SiLU: how one is recognised, the kernel for its gate, and the native code for the check.

MLPs with another activation, a clamp, a factor or a dropout look alike.  The samples tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import state
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, kernels_take

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

NOT_STATE = state.TORCH_S_OWN | {"forward"}


def recognise(module: Any) -> bool:
    """Whether ``module`` has the structure of a gated MLP: its three projections, an ``act_fn``, and no other child."""
    children = module._modules.keys()
    return set(PROJECTIONS) <= children <= {*PROJECTIONS, "act_fn"} and callable(getattr(module, "act_fn", None))


def forward(agreement: Agreement) -> Callable[..., Any]:
    """Return the replacement for an MLP's forward: (..., hidden) -> (..., hidden).

    The projections run unchanged, also quantised or with adapters.  The kernel works element by element, so the sizes
    of a module do not matter and are not in the key.
    """
    from verl_fl_overlay.kernels.triton.gate import silu_and_mul

    def forward(self: Any, *inputs: Tensor, **named: Tensor) -> Any:
        if not torch.compiler.is_compiling() and len(inputs) == 1 and not named and kernels_take(*inputs):
            (values,), activation = inputs, self.act_fn
            device = values.device
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else values.dtype
            key = ("gated_mlp", type(self), dtype, state.of_module(self, NOT_STATE), state.of(activation))
            if agreement.agree(key, device, _pair, self, silu_and_mul):
                gate, up = self.gate_proj(values), self.up_proj(values)
                same = gate.dtype == up.dtype and kernels_take(gate, up)
                return self.down_proj(silu_and_mul(gate, up) if same else activation(gate) * up)
        return type(self).forward(self, *inputs, **named)

    return forward


def _pair(samples: Samples, mlp: Any, kernel: Callable[..., Tensor]) -> Pair:
    def native(values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        modules = mlp._modules | dict(zip(PROJECTIONS, map(_linear, weights), strict=True))
        return (state.run_natively(mlp, lambda probe: type(mlp).forward(probe, values), _modules=modules),)

    def fused(values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        hidden = kernel(nn.functional.linear(values, gate), nn.functional.linear(values, up))
        return (nn.functional.linear(hidden, down),)

    # Tokens of all magnitudes: similar activations (GELU, its approximations) differ most around 1, and large values
    # show a clamp.
    hidden, inner = 64, 96
    gate, up = (samples.normal(inner, hidden) / 8 for _ in range(2))
    return (
        (samples.rows((0.1, 0.5, 1, 1, 2, 5, 40), hidden), gate, up, samples.normal(hidden, inner) / 8),
        native,
        fused,
    )


def _linear(weight: Tensor) -> nn.Module:
    """Return a linear module with the tensor ``weight`` itself, so that the tensor gets the gradient."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    del linear.weight
    linear.weight = weight
    return linear
