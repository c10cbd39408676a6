"""Whether a fused kernel gives the numbers of what it replaces, found out on this chip before it is used.

Both run once on small random data, with gradients where there are any.  What differs, or cannot be built on this chip,
stays native; that is logged once and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels import turns

logger = logging.getLogger("verl_fl_overlay")

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest norm of a difference over the norm of native's tensor; a kernel rounds once where native rounds twice."""

NATIVE_DEVICES = ("cpu", "meta")
"""There are no kernels for these."""

Run = Callable[..., tuple[Tensor, ...]]
Random = Callable[..., Tensor]
"""Makes a tensor of random numbers of the shape that it is called with."""

Pair = tuple[tuple[Tensor, ...], Run, Run]
"""Random inputs, what native computes from them, and the same with the kernel."""

_checks: dict[tuple[Any, ...], str] = {}
"""What is looked up at every call: kind, whose forward or step, type, what else decides -> "", or why it is native."""


def checks() -> dict[str, str]:
    """Return what was checked: "kind in class, type" -> "same", or why it stays native in one of its sizes."""
    told: dict[str, str] = {}
    for (kind, where, dtype, *_), reason in _checks.items():
        name = f"{kind} in {where.__name__}, {str(dtype).removeprefix('torch.')}"
        told[name] = reason or told.get(name, "same")
    return told


def agree(key: tuple[Any, ...], device: torch.device, pair: Callable[..., Pair], *of: Any) -> bool:
    """Whether the kernel gives native's numbers: looked up by ``key``, found out by running ``pair(random, *of)``."""
    reason = _checks.get(key)
    if reason is None:
        kind, where, dtype, *_ = key
        try:
            reason = _difference(kind, device, dtype, pair, *of)
        except Exception as error:  # whatever Triton raises when it cannot build a kernel, or torch has none
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
    differentiable = any(result.requires_grad for result in results)  # an optimizer's step is not
    none = (None,) * len(leaves)
    gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True) if differentiable else none
    return tuple(result.detach() for result in results), gradients
