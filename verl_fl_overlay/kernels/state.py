"""The state of a module as a part of a key: all that it computes with, except its inputs and weights.

A kernel is checked for one state of a module and is used for that state only.  The key is built at each call.  So if a
module's ``limit`` changes after the check, its key changes too, and it is checked again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

VALUES = frozenset(
    {bool, int, float, complex, str, bytes, NoneType, torch.dtype, torch.device, torch.Size, torch.memory_format}
    | {FunctionType, BuiltinFunctionType, type}
)
"""Types of objects that never change, and functions and classes, which are compared by identity."""

TORCH_S_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What torch keeps in each module: parameters, buffers, children and hooks."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what others want to see of its calls; a kernel that takes in its work calls it no more."""

HOLDERS = (Tensor, MethodType)
"""Types of objects that hold more than their attributes show; a bound method holds an object, maybe the model."""


class Unseen(NamedTuple):
    """Stands in a key for an object that may change or act unseen; a kernel is not used with such a key."""

    type: type
    why: str = "whose changes cannot be seen"


class _Object:
    """An object, equal to itself as long as its attributes are the same; changes inside these are not noticed.

    A key keeps the object alive, so no other object can get its id.
    """

    __slots__ = ("attributes", "value")

    def __init__(self, value: Any) -> None:
        # object's, since a configuration's own is slow Python code, and this runs at each call of an MLP.
        self.value, self.attributes = value, object.__getattribute__(value, "__dict__").copy()

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, _Object) and self.value is other.value and self.attributes == other.attributes
        except (RuntimeError, ValueError):  # an array or tensor was replaced, and cannot be compared
            return False


def of_module(module: Any, but: frozenset[str] = TORCH_S_OWN) -> tuple[Any, ...]:
    """Return the module's own attributes, without those named in ``but``, as a part of a key.

    Names that begin with two underscores are left out: FSDP2 writes them into the modules that it shards.
    """
    own = module.__dict__
    return tuple(
        [
            (name, kind, own[name]) if (kind := type(own[name])) in VALUES else (name, of(own[name]))
            for name in own
            if name not in but and not name.startswith("__")
        ]
    )


def of(value: Any) -> Any:
    """Return ``value`` as a part of a key; two parts are equal only if both values compute the same.

    Lists, tuples, dicts, sets and modules without weights are compared by content, other objects with attributes by
    identity and attributes.  Values that cannot be compared in this way, such as tensors, become ``Unseen``, and so
    does a module with hooks.
    """
    kind = type(value)
    if kind in VALUES:
        return kind, value
    if kind is list or kind is tuple:
        return kind, *map(of, value)
    if kind is dict:
        return kind, *((of(name), of(each)) for name, each in value.items())
    if kind is set or kind is frozenset:
        return kind, frozenset(map(of, value))
    if issubclass(kind, nn.Module):
        if value._parameters or value._buffers:
            return Unseen(kind)
        if any(getattr(value, hooks) for hooks in HOOKS) or _has_any_global_hook():
            return Unseen(kind, "whose hooks a kernel does not call")
        return kind, of_module(value), *map(of, value._modules.values())
    if issubclass(kind, HOLDERS) or not kind.__dictoffset__:
        return Unseen(kind)
    return _Object(value)


def unseen(part: Any) -> Unseen | None:
    """Return the first ``Unseen`` in a part of a key."""
    if isinstance(part, Unseen):
        return part
    inner = part if isinstance(part, tuple | frozenset) else ()
    return next(filter(None, map(unseen, inner)), None)


def run_natively(module: Any, run: Callable[[Any], Any], **attributes: Any) -> Any:
    """Return ``run(copy)`` for a copy of ``module`` with these attributes and the forward of its class.

    Raises:
        TypeError: ``run`` changed the module's state; a kernel in its place would not do that.
    """
    probe = object.__new__(type(module))  # under FSDP2 copy.copy returns the module that it wrapped
    probe.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"} | attributes
    but = TORCH_S_OWN | attributes.keys()
    before = of_module(probe, but)
    result = run(probe)
    if of_module(probe, but) != before:
        raise TypeError("its forward changes its own attributes, which a kernel does not")
    return result
