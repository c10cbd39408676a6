"""The forwards of fused modules: a kernel where it was seen to give the module's own numbers, native elsewhere.

Before a kernel is used for a class, the sizes that it is compiled for and a floating type, both forwards run once on
small random data, with gradients.
What differs, or cannot be built on this chip, stays native; that is logged once and reported.
"""

from __future__ import annotations

import copy
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

_checks: dict[tuple[str, Any, torch.dtype, tuple[int, ...]], str] = {}


def checks() -> dict[str, str]:
    """Return what was checked: "kind in class, type" -> "same", or why it stays native in one of its sizes."""
    told: dict[str, str] = {}
    for (kind, where, dtype, _), reason in _checks.items():
        name = f"{kind} in {where.__name__}, {str(dtype).removeprefix('torch.')}"
        told[name] = reason or told.get(name, "same")
    return told


def kernels() -> Any:
    """Return the module with the kernels; it needs Triton, so it is imported when a device's tensor is there."""
    from verl_fl_overlay import fused_triton

    return fused_triton


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Be the forward of an RMS norm: (..., hidden) -> (..., hidden)."""
    native, weight = type(self).forward, self.weight
    if weight.dtype == hidden_states.dtype and _can_run(hidden_states, weight):

        def inputs(random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            return random(6, weight.shape[0]), random(weight.shape[0])

        def run_native(values: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return (native(_with(self, weight=scale), values),)

        def run_fused(values: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return (kernels().rms_norm(values, scale, epsilon(self)),)

        if _agree("rms_norm", type(self), hidden_states, (weight.shape[0],), inputs, run_native, run_fused):
            return run_fused(hidden_states, weight)[0]
    return native(self, hidden_states)


def gated_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    """Be the forward of an MLP gated by SiLU: (..., hidden) -> (..., hidden)."""
    native = type(self).forward
    if not _can_run(hidden_states):
        return native(self, hidden_states)
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    if gate.dtype == up.dtype and _can_run(gate, up):

        def inputs(random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            return random(6, 64), random(96, 64), random(96, 64), random(64, 96)

        def run_native(values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            names = ("gate_proj", "up_proj", "down_proj")
            modules = {name: _linear(weight) for name, weight in zip(names, weights, strict=True)}
            return (native(_with(self, _modules={**self._modules, **modules}), values),)

        def run_fused(values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
            hidden = kernels().silu_and_mul(nn.functional.linear(values, gate), nn.functional.linear(values, up))
            return (nn.functional.linear(hidden, down),)

        if _agree("gated_mlp", type(self), gate, (), inputs, run_native, run_fused):
            return self.down_proj(kernels().silu_and_mul(gate, up))
    return self.down_proj(self.act_fn(gate) * up)


def rotary(native: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in place of a model file's own ``apply_rotary_pos_emb(q, k, cos, sin)``.

    It rotates q (batch, heads, length, size) and k by cos and sin (batch or 1, length, size).
    """

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        usual = not rest and not more and q.dim() == 4 and cos.dim() == 3 and q.shape[-1] == cos.shape[-1]
        if usual and q.dtype == k.dtype == cos.dtype and _can_run(q, k, cos, sin):
            size = q.shape[-1]

            def inputs(random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
                heads = (random(2, each.shape[1], 5, size) for each in (q, k))  # the kernel is made for so many
                return *heads, random(2, 5, size), random(2, 5, size)

            def run_native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
                return tuple(native(q, k, cos.detach(), sin.detach()))

            def run_fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
                return tuple(kernels().rotate(q, k, cos.detach(), sin.detach()))

            if _agree("rotary", native, q, (q.shape[1], k.shape[1], size), inputs, run_native, run_fused):
                return kernels().rotate(q, k, cos, sin)
        return native(q, k, cos, sin, *rest, **more)

    return apply_rotary_pos_emb


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


def _agree(
    kind: str,
    where: Any,
    like: Tensor,
    sizes: tuple[int, ...],
    inputs: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]],
    *runs: Run,
) -> bool:
    """Whether the kernel gives native's numbers; ``sizes`` are those for which another kernel is compiled."""
    key = (kind, where, like.dtype, sizes)
    if key not in _checks:
        try:
            _checks[key] = _difference(kind, like, inputs, *runs)
        except Exception as error:  # whatever Triton raises when it cannot build a kernel
            _checks[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if _checks[key]:
            logger.warning("%s of %s stays native for %s: %s", kind, where.__qualname__, like.dtype, _checks[key])
    return not _checks[key]


def _difference(
    kind: str,
    like: Tensor,
    inputs: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]],
    native: Run,
    fused: Run,
) -> str:
    """Run both on the same random data; return what differs more than its type allows, "" if nothing does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    values = inputs(random)
    shapes = ", ".join("x".join(map(str, value.shape)) for value in values)
    # The hooks that save nothing hide the check from activation checkpointing, which counts what is saved.
    with (
        turns.first_to_compile(f"{kind} of {shapes} in {like.dtype}"),
        torch.enable_grad(),
        torch.autocast(like.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        (results, gradients), (expected, expected_gradients) = (_run(each, values) for each in (fused, native))
    for what, found, exact in (("output", results, expected), ("gradient", gradients, expected_gradients)):
        for index, (one, other) in enumerate(zip(found, exact, strict=True)):
            if (one is None) != (other is None):
                return f"{what} {index} is missing on one side"
            if one is None or other is None:
                continue
            off = float((one.float() - other.float()).norm() / other.float().norm())
            if not off <= TOLERANCE[like.dtype]:
                return f"{what} {index} differs by {off:.2g}, allowed is {TOLERANCE[like.dtype]:g}"
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
