"""The forwards of fused modules: a kernel where it was seen to give the module's own numbers, native elsewhere.

Before a kernel is used for a class, the sizes that it is compiled for and a floating type, both forwards run once on
small random data, with gradients.
What differs, or cannot be built on this chip, stays native; that is logged once and reported.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay import turns
from verl_fl_overlay.fused import epsilon

logger = logging.getLogger("verl_fl_overlay")

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest norm of a difference over the norm of native's tensor; a kernel rounds once where native rounds twice."""

NATIVE_DEVICES = ("cpu", "meta")
"""There are no kernels for these."""

Run = Callable[..., tuple[Tensor, ...]]
Random = Callable[..., Tensor]
"""Makes a tensor of random numbers of the shape that it is called with."""

Pair = tuple[tuple[Tensor, ...], Run, Run]
"""Random inputs, native's forward on them, and the same with the kernel."""

_checks: dict[tuple[Any, ...], str] = {}
"""What is looked up at every call: kind, whose forward, type, and whatever else decides -> "", or why it is native."""


def checks() -> dict[str, str]:
    """Return what was checked: "kind in class, type" -> "same", or why it stays native in one of its sizes."""
    told: dict[str, str] = {}
    for (kind, where, dtype, *_), reason in _checks.items():
        name = f"{kind} in {where.__name__}, {str(dtype).removeprefix('torch.')}"
        told[name] = reason or told.get(name, "same")
    return told


@functools.cache
def kernels() -> Any:
    """Return the module with the kernels; it needs Triton, so it is imported when a device's tensor is there."""
    from verl_fl_overlay import fused_triton

    return fused_triton


def rms_norm(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
    """Be the forward of an RMS norm: (..., hidden) -> (..., hidden)."""
    if len(inputs) == 1 and not named:
        (values,), weight = inputs, self.weight
        if weight.dtype == values.dtype and _can_run(values, weight):
            key = ("rms_norm", type(self), values.dtype, weight.shape)
            if _agree(key, values.device, _norms, self):
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
        if _agree(key, device, _mlps, self):
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
            if _agree(("rotary", native, q.dtype, heads), q.device, _rotaries, native, *heads):
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
        and tensor.device.type not in NATIVE_DEVICES
        and tensor.dtype in TOLERANCE
        and tensor.numel() > 0
        for tensor in tensors
    )


def _agree(key: tuple[Any, ...], device: torch.device, pair: Callable[..., Pair], *of: Any) -> bool:
    """Whether the kernel gives native's numbers: looked up by ``key``, found out by running ``pair(random, *of)``."""
    reason = _checks.get(key)
    if reason is None:
        kind, where, dtype, *_ = key
        try:
            reason = _difference(kind, device, dtype, pair, *of)
        except Exception as error:  # whatever Triton raises when it cannot build a kernel
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if reason:
            logger.warning("%s of %s stays native for %s: %s", kind, where.__qualname__, dtype, reason)
        _checks[key] = reason
    return not reason


def _difference(kind: str, device: torch.device, dtype: torch.dtype, pair: Callable[..., Pair], *of: Any) -> str:
    """Run both on the same random data; return what differs more than its type allows, "" if nothing does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # The hooks that save nothing hide the check from activation checkpointing, which counts what is saved.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        values, native, fused = pair(random, *of)
        shapes = ", ".join("x".join(map(str, value.shape)) for value in values)
        with turns.first_to_compile(f"{kind} of {shapes} in {dtype}"):
            (results, gradients), (expected, expected_gradients) = (_run(each, values) for each in (fused, native))
    for what, found, exact in (("output", results, expected), ("gradient", gradients, expected_gradients)):
        for index, (one, other) in enumerate(zip(found, exact, strict=True)):
            if (one is None) != (other is None):
                return f"{what} {index} is missing on one side"
            if one is None or other is None:
                continue
            off = float((one.float() - other.float()).norm() / other.float().norm())
            if not off <= TOLERANCE[dtype]:
                return f"{what} {index} differs by {off:.2g}, allowed is {TOLERANCE[dtype]:g}"
    return ""


def _run(run: Run, values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    leaves = [value.clone().requires_grad_() for value in values]
    results = run(*leaves)
    upstream = [torch.linspace(-1, 1, r.numel(), device=r.device, dtype=r.dtype).view(r.shape) for r in results]
    gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    return tuple(result.detach() for result in results), gradients


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
