"""Checks on this chip, before a fused kernel is used, that it gives the same numbers as what it replaces.

Both run once on the same samples: forward, and backward if there are gradients.  If they differ, or if the kernel
cannot be built on this chip, the native code stays in use; that is logged once and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import state, turns

logger = logging.getLogger("verl_fl_overlay")

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest relative difference of a row, by 2-norms; a kernel rounds once where native code rounds twice."""

NATIVE_DEVICES = ("cpu", "meta")
"""Device types that have no kernels."""

MOST_CHECKS = 1024
"""Most checks of one class and type.  If a class needs more, its state changes from call to call; it stays native."""

Key = tuple[Any, ...]
"""(kind, the class or function that is replaced, floating type, all else that decides what is computed)."""

Run = Callable[..., tuple[Tensor, ...]]


class Samples:
    """Numbers that distinguish lookalikes: rows of very different magnitudes, with different means.

    They come from this object's own generator, so each check gets the same numbers.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Return fp32 numbers of ``shape`` on the CPU, of mean 0 and standard deviation 1."""
        return torch.randn(shape, generator=self._generator)

    def rows(self, scales: Sequence[float], *shape: int) -> Tensor:
        """Return (len(scales), *shape): rows of these magnitudes; their means are 1, -2 and 0 magnitudes in turn."""
        means = torch.tensor([(1.0, -2.0, 0.0)[index % 3] for index in range(len(scales))])
        per_row = (-1, *[1] * len(shape))
        return torch.tensor(scales).view(per_row) * (self.normal(len(scales), *shape) + means.view(per_row))


Pair = tuple[tuple[Tensor, ...], Run, Run]
"""Inputs, what native computes from them, and the same with the kernel."""


def can_be_checked(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there may be kernels for this type and device."""
    return dtype in TOLERANCE and device.type not in NATIVE_DEVICES


def kernels_take(*tensors: Tensor) -> bool:
    """Whether a kernel may get these: plain tensors, not empty, with a type and a device that have kernels."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and can_be_checked(tensor.dtype, tensor.device) and tensor.numel() > 0
        for tensor in tensors
    )


class Agreement:
    """The results of checks.  A feature makes a new object when it starts, so a new start checks again."""

    def __init__(self) -> None:
        self._reasons: dict[Key, str] = {}

    def checks(self) -> dict[str, str]:
        """Return what was checked: "kind in class, type" -> "same", or why one of these stays native."""
        told: dict[str, str] = {}
        for (kind, where, dtype, *_), reason in self._reasons.items():
            name = f"{kind} in {where.__name__}, {_name(dtype)}"
            told[name] = reason or told.get(name, "same")
        return told

    def agree(self, key: Key, device: torch.device, pair: Callable[..., Pair], *of: Any) -> bool:
        """Whether the kernel may be used; arguments as for ``reason``."""
        return not self.reason(key, device, pair, *of)

    def reason(self, key: Key, device: torch.device, pair: Callable[..., Pair], *of: Any) -> str:
        """Return why native code stays in use, "" if the kernel may be used.  Each key is checked once.

        Args:
            key: what the answer holds for.
            device: where the kernel runs.
            pair: makes what is compared; it is called with ``Samples`` and with ``of``.
            of: what ``pair`` needs to know.
        """
        reason = self._reasons.get(key)
        return self._check(key, device, pair, *of) if reason is None else reason

    def _check(self, key: Key, device: torch.device, pair: Callable[..., Pair], *of: Any) -> str:
        """Check, and remember what was found."""
        kind, where, dtype = whole_class = key[:3]
        if whole_class in self._reasons:
            return self._reasons[whole_class]
        before = [reason for other, reason in self._reasons.items() if other[:3] == whole_class]
        if len(before) == MOST_CHECKS:
            key, reason = whole_class, f"its state changes too often, it was checked {MOST_CHECKS} times"
        elif hidden := state.unseen(key):
            reason = f"its state holds a {hidden.type.__name__}, whose changes cannot be seen"
        else:
            try:
                reason = _difference(kind, device, dtype, pair, *of)
            except Exception as error:  # Triton, if it cannot build a kernel, and torch, if it has none
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if reason and not any(before):
            logger.warning("%s of %s stays native for %s: %s", kind, where.__qualname__, dtype, reason)
        self._reasons[key] = reason
        return reason


def _difference(kind: str, device: torch.device, dtype: torch.dtype, pair: Callable[..., Pair], *of: Any) -> str:
    """Run both on the same samples; return what differs by more than its type allows, "" if nothing does."""
    # Activation checkpointing counts saved tensors; these hooks hide the check's tensors from it.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        _random_numbers_of_its_own(device),
    ):
        values, native, fused = pair(Samples(), *of)
        values = tuple(value.to(device, dtype) for value in values)
        shapes = ", ".join("x".join(map(str, value.shape)) for value in values)
        with turns.first_to_compile(f"{kind} of {shapes} in {dtype}"):
            found, expected = (_run(each, values) for each in (fused, native))
    for what in expected:
        for index, (one, other) in enumerate(zip(found[what], expected[what], strict=True)):
            if reason := _compare(one, other):
                return f"{what} {index} {reason}"
    return ""


@contextmanager
def _random_numbers_of_its_own(device: torch.device) -> Iterator[None]:
    """Restore torch's generators afterwards, and make random draws inside (a forward's dropout) the same each time."""
    devices = range(torch.get_device_module(device).device_count()) if device.type != "cpu" else ()
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(0)
        yield


def _run(run: Run, values: tuple[Tensor, ...]) -> dict[str, tuple[Tensor | None, ...]]:
    """Return the results and, unless these have no gradient (an optimizer's step), the gradients of ``values``."""
    leaves = [value.clone().requires_grad_() for value in values]
    results = run(*leaves)
    told: dict[str, tuple[Tensor | None, ...]] = {"output": tuple(result.detach() for result in results)}
    if any(result.requires_grad for result in results):
        # Made in fp32: in fp16 a number of elements beyond 65,504 gives NaN.
        upstream = [torch.linspace(-1, 1, result.numel()).view(result.shape).to(result) for result in results]
        told["gradient"] = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    return told


def _compare(found: Tensor | None, expected: Tensor | None) -> str:
    """Return how ``found`` differs, "" if each of its rows (along the last dimension) is within the tolerance."""
    if found is None or expected is None:
        return "" if found is expected else "is missing on one side"
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"is {tuple(found.shape)} {_name(found.dtype)}, natively {tuple(expected.shape)} {_name(expected.dtype)}"
    difference, size = ((each.float().norm(dim=-1)) for each in (found.float() - expected.float(), expected))
    off = float((difference / size).masked_fill(difference == 0, 0).max())  # NaN if there is one
    tolerance = TOLERANCE[expected.dtype]
    return "" if off <= tolerance else f"differs by {off:.2g}, allowed is {tolerance:g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
