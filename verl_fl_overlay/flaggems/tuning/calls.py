"""The operators that one training step calls, each with its arguments described so that the call can be repeated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from verl_fl_overlay.flaggems import safety
from verl_fl_overlay.flaggems.library import Kernel
from verl_fl_overlay.flaggems.routing import Router

Step = Callable[[], None]


@dataclass(frozen=True)
class Like:
    """A tensor's description, from which a similar tensor is made.

    Two calls are the same if sizes, strides, dtypes and devices are.  The values of whole numbers and masks are kept,
    on the CPU, because the time of a lookup or a scatter depends on its indices.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    values: torch.Tensor | None = field(compare=False, default=None)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        """Describe ``tensor``."""
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        values = None if tensor.dtype.is_floating_point else tensor.as_strided(_distinct(size, stride), stride).cpu()
        return cls(size, stride, tensor.dtype, str(tensor.device), values)

    def make(self) -> torch.Tensor:
        """Return a tensor of this size, stride, dtype and device, with the kept values or small random numbers."""
        distinct = _distinct(self.size, self.stride)
        tensor = torch.empty_strided(distinct, self.stride, dtype=self.dtype, device=self.device)
        tensor = tensor.normal_().mul_(0.1) if self.values is None else tensor.copy_(self.values)
        return tensor.expand(self.size)


def _distinct(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of the stored data: a dimension that an expanded tensor only repeats counts as 1."""
    return tuple(1 if step == 0 else length for length, step in zip(size, stride, strict=True))


@dataclass(frozen=True)
class Call:
    """The flattened arguments of a call, tensors as ``Like``, and how they were nested."""

    leaves: tuple[Any, ...]
    tree: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Describe a call of an operator."""
        leaves, tree = tree_flatten((args, kwargs))
        return cls(tuple(Like.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), tree)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments like those of the call."""
        made = tree_unflatten([leaf.make() if isinstance(leaf, Like) else leaf for leaf in self.leaves], self.tree)
        return made[0], made[1]

    @property
    def elements(self) -> int:
        """The elements of all tensors, plus one, so that a call without tensors has a size too."""
        return 1 + sum(math.prod(leaf.size) for leaf in self.leaves if isinstance(leaf, Like))


def operator(key: str) -> Any:
    """Return torch's operator of an aten key, such as "add.Tensor"."""
    name, _, overload = key.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


class _Recorder:
    """Counts calls with its own kernels; each of them then lets torch's operator compute."""

    def __init__(self) -> None:
        self.calls: dict[str, Counter[Call]] = {}
        self._describing = False

    def router(self, kernel: Kernel) -> Router:
        """Return a router that puts a counting kernel in the place of ``kernel``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(kernel.key, args, kwargs)
            router.leave()
            try:
                return operator(kernel.key)(*args, **kwargs)
            finally:
                router.enter()

        router = Router([safety.seen_by_autograd(replace(kernel, function=counted))])
        return router

    def _count(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._describing:  # this call was made only to describe another one
            return
        self._describing = True
        try:
            self.calls.setdefault(key, Counter())[Call.of(args, kwargs)] += 1
        finally:
            self._describing = False


def calls_of(step: Step, kernels: Iterable[Kernel]) -> dict[str, Counter[Call]]:
    """Return, for each aten key of ``kernels``, the calls of one step that its kernel would get.

    A call is counted where a routed kernel would be called, so the calls inside other operators are counted too; torch
    computes them.  A ``TorchDispatchMode`` would not see those calls, and it would change the step: while one is on,
    autograd adds gradients out of place.
    """
    recorder = _Recorder()
    routers = [recorder.router(kernel) for kernel in kernels]
    try:
        for router in routers:
            router.enter()
        step()
    finally:
        for router in routers:
            router.leave()
    return recorder.calls
