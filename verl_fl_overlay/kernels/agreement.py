"""Checks on this chip, before a fused kernel is used, that it gives the same numbers as what it replaces.

Both run once on the same samples: forward, and backward if there are gradients.  If they differ, or if the kernel
cannot be built on this chip, the native code stays in use; that is logged once and reported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels import differentiation, state, turns

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


Pair = tuple[tuple[Tensor, ...], Run, Run] | tuple[tuple[Tensor, ...], Run, Run, Any]
"""Inputs, what native computes from them, and the same with the kernel; also which variant of the kernel that is."""


class DiffersError(Exception):
    """No variant of the kernel is what native computes; the message says by how much the nearest one differs."""


class Found(NamedTuple):
    """What a check found: why native code stays in use ("" if the kernel may be used), and the kernel's variant."""

    reason: str
    variant: Any = None


def can_be_checked(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there may be kernels for this type and device."""
    return dtype in TOLERANCE and device.type not in NATIVE_DEVICES


def kernels_take(*tensors: Tensor) -> bool:
    """Whether a kernel may get these: plain tensors, not empty, with a type and a device that have kernels.

    A kernel has a backward and nothing else, so torch's transforms (vmap, jvp) and forward-mode gradients need native.
    """
    return (
        all(
            type(tensor) in (Tensor, nn.Parameter)
            and can_be_checked(tensor.dtype, tensor.device)
            and tensor.numel() > 0
            for tensor in tensors
        )
        and not differentiation.is_transformed()
    )


def nearest(results: Iterable[tuple[Any, Tensor, Tensor]]) -> tuple[Any, float]:
    """Return the variant whose result is nearest to native's, and by how much its worst row differs.

    Args:
        results: for each variant, the variant, what native computes, and the variant's result.
    """
    found = [(variant, _off(result, native)) for variant, native, result in results]
    return min(found, key=lambda each: math.inf if math.isnan(each[1]) else each[1])


class Agreement:
    """The results of checks.  A feature makes a new object when it starts, so a new start checks again."""

    def __init__(self) -> None:
        self._found: dict[Key, Found] = {}

    def checks(self) -> dict[str, str]:
        """Return what was checked: "kind in class, type" -> "same", or why one of these stays native."""
        told: dict[str, str] = {}
        for (kind, where, dtype, *_), (reason, _) in self._found.items():
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
        return self._of(key, device, pair, of).reason

    def variant(self, key: Key, device: torch.device, pair: Callable[..., Pair], *of: Any) -> Any:
        """Return which variant of the kernel may be used, None if native code stays; arguments as for ``reason``."""
        return self._of(key, device, pair, of).variant

    def agrees_somewhere(self, kind: str, where: Any) -> bool:
        """Whether a check of this kind in this class or function found that its kernel may be used."""
        return any(key[:2] == (kind, where) and not found.reason for key, found in self._found.items())

    def _of(self, key: Key, device: torch.device, pair: Callable[..., Pair], of: tuple[Any, ...]) -> Found:
        found = self._found.get(key)
        return self._check(key, device, pair, of) if found is None else found

    def _check(self, key: Key, device: torch.device, pair: Callable[..., Pair], of: tuple[Any, ...]) -> Found:
        """Check, and remember what was found."""
        kind, where, dtype = whole_class = key[:3]
        if whole_class in self._found:
            return self._found[whole_class]
        before = [found.reason for other, found in self._found.items() if other[:3] == whole_class]
        if len(before) == MOST_CHECKS:
            key, found = whole_class, Found(f"its state changes too often, it was checked {MOST_CHECKS} times")
        elif hidden := state.unseen(key):
            found = Found(f"its state holds a {hidden.type.__name__}, {hidden.why}")
        else:
            try:
                found = _found(kind, device, dtype, pair, of)
            except DiffersError as error:
                found = Found(str(error))
            except Exception as error:  # Triton, if it cannot build a kernel, and torch, if it has none
                found = Found(f"{type(error).__name__}: {' '.join(str(error).split())}")
        if found.reason and not any(before):
            logger.warning("%s of %s stays native for %s: %s", kind, where.__qualname__, dtype, found.reason)
        self._found[key] = found
        return found


def _found(
    kind: str, device: torch.device, dtype: torch.dtype, pair: Callable[..., Pair], of: tuple[Any, ...]
) -> Found:
    """Run both on the same samples; the reason is what differs by more than its type allows, "" if nothing does."""
    # Activation checkpointing counts saved tensors; these hooks hide the check's tensors from it.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        _random_numbers_of_its_own(device),
    ):
        values, native, fused, *variant = pair(Samples(), *of)
        values = tuple(value.to(device, dtype) for value in values)
        shapes = ", ".join("x".join(map(str, value.shape)) for value in values)
        with turns.first_to_compile(f"{kind} {variant} of {shapes} in {dtype}"):
            results, expected = (_run(each, values) for each in (fused, native))
    for what in expected:
        for index, (one, other) in enumerate(zip(results[what], expected[what], strict=True)):
            if reason := _compare(one, other):
                return Found(f"{what} {index} {reason}")
    return Found("", *variant)


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
    off = _off(found, expected)
    tolerance = TOLERANCE[expected.dtype]
    return "" if off <= tolerance else f"differs by {off:.2g}, allowed is {tolerance:g}"


def _off(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference of a row, by 2-norms; NaN if there is one."""
    difference, size = (each.float().norm(dim=-1) for each in (found.float() - expected.float(), expected))
    return float((difference / size).masked_fill(difference == 0, 0).max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
