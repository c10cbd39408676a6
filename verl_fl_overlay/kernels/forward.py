"""The forwards of fused modules: a kernel where it was seen to give the module's own numbers, native elsewhere.

What was seen holds for a class, the sizes that a kernel is compiled for and a floating type.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import agreement as fused_check
from verl_fl_overlay.kernels.agreement import Pair, Random, agree
from verl_fl_overlay.kernels.fused import epsilon


@functools.cache
def kernels() -> Any:
    """Return the module with the kernels; it needs Triton, so it is imported when a device's tensor is there."""
    from verl_fl_overlay.kernels.triton import modules as fused_triton

    return fused_triton


def rms_norm(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
    """Be the forward of an RMS norm: (..., hidden) -> (..., hidden)."""
    if len(inputs) == 1 and not named:
        (values,), weight = inputs, self.weight
        if weight.dtype == values.dtype and _can_run(values, weight):
            key = ("rms_norm", type(self), values.dtype, weight.shape)
            if agree(key, values.device, _norms, self):
                return kernels().rms_norm(values, weight, epsilon(self))
    return type(self).forward(self, *inputs, **named)


def gated_mlp(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
    """Be the forward of an MLP gated by SiLU: (..., hidden) -> (..., hidden)."""
    if len(inputs) == 1 and not named and _can_run(*inputs):
        (values,), activation = inputs, self.act_fn
        device = values.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else values.dtype
        # Two models of one class have the same forward, but each has the activation of its own configuration.
        key = ("gated_mlp", type(self), dtype, type(activation) if isinstance(activation, nn.Module) else activation)
        if agree(key, device, _mlps, self):
            gate, up = self.gate_proj(values), self.up_proj(values)
            same = gate.dtype == up.dtype and _can_run(gate, up)
            return self.down_proj(kernels().silu_and_mul(gate, up) if same else activation(gate) * up)
    return type(self).forward(self, *inputs, **named)


def rotary(native: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in place of a model file's own ``apply_rotary_pos_emb(q, k, cos, sin)``.

    It rotates q (batch, heads, length, size) and k by cos and sin (batch or 1, length, size).
    """

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        usual = not rest and not more and q.dim() == 4 and cos.dim() == 3 and q.shape[-1] == cos.shape[-1]
        if usual and q.dtype == k.dtype == cos.dtype and _can_run(q, k, cos, sin):
            heads = q.shape[1], k.shape[1], q.shape[-1]  # another kernel is compiled for others
            if agree(("rotary", native, q.dtype, heads), q.device, _rotaries, native, *heads):
                return kernels().rotate(q, k, cos, sin)
        return native(q, k, cos, sin, *rest, **more)

    return apply_rotary_pos_emb


def _norms(random: Random, norm: Any) -> Pair:
    def native(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (type(norm).forward(_with(norm, weight=weight), values),)

    def fused(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (kernels().rms_norm(values, weight, epsilon(norm)),)

    size = norm.weight.shape[0]
    return (random(6, size), random(size)), native, fused


def _mlps(random: Random, mlp: Any) -> Pair:
    def native(values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        names = ("gate_proj", "up_proj", "down_proj")
        modules = {name: _linear(weight) for name, weight in zip(names, weights, strict=True)}
        return (type(mlp).forward(_with(mlp, _modules={**mlp._modules, **modules}), values),)

    def fused(values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        hidden = kernels().silu_and_mul(nn.functional.linear(values, gate), nn.functional.linear(values, up))
        return (nn.functional.linear(hidden, down),)

    return (random(6, 64), random(96, 64), random(96, 64), random(64, 96)), native, fused


def _rotaries(random: Random, function: Callable[..., Any], q_heads: int, k_heads: int, size: int) -> Pair:
    def native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(q, k, cos.detach(), sin.detach()))

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(kernels().rotate(q, k, cos.detach(), sin.detach()))

    q, k = random(2, q_heads, 5, size), random(2, k_heads, 5, size)
    return (q, k, random(2, 5, size), random(2, 5, size)), native, fused


def _can_run(*tensors: Tensor) -> bool:
    """Whether a kernel may see these: plain tensors of a type with a tolerance, on a device, not while compiling."""
    if torch.compiler.is_compiling():
        return False  # torch.compile fuses the native forward itself
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type not in fused_check.NATIVE_DEVICES
        and tensor.dtype in fused_check.TOLERANCE
        and tensor.numel() > 0
        for tensor in tensors
    )


def _with(module: Any, **attributes: Any) -> Any:
    """Return a copy of ``module`` that differs in these attributes, without hooks and a forward of its own."""
    probe = copy.copy(module)
    probe.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"} | attributes
    return probe


def _linear(weight: Tensor) -> nn.Module:
    """Return a linear module whose weight is ``weight`` itself, so that it gets the gradient."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    del linear.weight
    linear.weight = weight
    return linear
