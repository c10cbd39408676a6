"""The operators that one training step calls, with what they are called with, so that a call can be made again."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from verl_fl_overlay.flaggems.library import Kernel

Step = Callable[[], None]


@dataclass(frozen=True)
class Like:
    """A tensor's description, from which a like one is made.

    Two calls are the same if sizes, strides, dtypes and devices are.  Whole numbers and masks are kept, on the CPU:
    how long a lookup or a scatter takes depends on where its indices point.
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
        """Return a tensor of this size, stride, dtype and device: the values kept, or small random numbers."""
        distinct = _distinct(self.size, self.stride)
        tensor = torch.empty_strided(distinct, self.stride, dtype=self.dtype, device=self.device)
        tensor = tensor.normal_().mul_(0.1) if self.values is None else tensor.copy_(self.values)
        return tensor.expand(self.size)


def _distinct(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size without what an expanded tensor only repeats."""
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
        """The elements of all tensors, and one: also a call without tensors has a size."""
        return 1 + sum(math.prod(leaf.size) for leaf in self.leaves if isinstance(leaf, Like))

    @property
    def on_cpu(self) -> bool:
        """Whether a tensor or a device among the arguments is the CPU's."""
        devices = (torch.device(leaf.device) if isinstance(leaf, Like) else leaf for leaf in self.leaves)
        return any(isinstance(device, torch.device) and device.type == "cpu" for device in devices)


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Counts the calls of the operators that ``kernels`` are for."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        super().__init__()
        self._for_cpu = {kernel.key: "CPU" in kernel.dispatch_keys for kernel in kernels}
        self.calls: dict[str, Counter[Call]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # DTensor and the like take themselves apart; their parts come back here
        key = func._schema.name.removeprefix("aten::")
        key += f".{func._overloadname}" if func._overloadname != "default" else ""
        if key in self._for_cpu:
            call = Call.of(args, kwargs)
            if self._for_cpu[key] or not call.on_cpu:
                with contextlib.suppress(TypeError):  # an argument that cannot be a key, such as a generator
                    self.calls.setdefault(key, Counter())[call] += 1
        return func(*args, **kwargs)


def record(step: Step, kernels: Iterable[Kernel]) -> dict[str, Counter[Call]]:
    """Return, for each aten key of ``kernels``, the calls of one step that they could have answered."""
    recorder = _Recorder(kernels)
    with recorder:
        step()
    return recorder.calls
