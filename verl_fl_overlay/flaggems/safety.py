"""Which kernels would cut or falsify a gradient if they took an operator's place.

FlagGems' kernels go to the backend's dispatch key.  An operator with a derivative formula keeps it there, since
autograd works one level above.  An operator that torch differentiates only by decomposing it has no such formula: a
kernel in its place ends the decomposition, and with it the gradient, without a word.
"""

from __future__ import annotations

import dis
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from verl_fl_overlay.flaggems.library import Kernel

_ENDS_GRADIENT = {"detach", "detach_", "no_grad", "inference_mode", "data_ptr"}
"""Names in a function's code which show that its result is not differentiated."""


def why_unsafe(kernel: Kernel) -> str:
    """Return why training must not use ``kernel``, "" if it may.  Call this before anything is registered."""
    if kernel.fault:
        return kernel.fault
    takes_autograds_place = any(key.startswith("Autograd") for key in kernel.dispatch_keys)
    if takes_autograds_place or differentiated_by_decomposition(kernel.key):
        cut = where_gradient_ends(kernel.function)
        if cut:
            return f"torch differentiates {kernel.key} only by decomposing it, and {cut}: its gradient would be cut"
    return ""


def seen_by_autograd(kernel: Kernel) -> Kernel:
    """Return a safe ``kernel`` as it must be registered; this differs where torch only decomposes the operator.

    There the kernel's function computes the gradient itself, so it is registered on autograd's key too.  With the
    backend's key alone torch warns of the missing registration, and announces that it will cut the gradient one day.
    """
    import torch

    if not differentiated_by_decomposition(kernel.key):
        return kernel
    above = (f"Autograd{key}" for key in kernel.dispatch_keys)
    keys = tuple(key for key in above if hasattr(torch._C.DispatchKey, key))
    return replace(kernel, dispatch_keys=(*kernel.dispatch_keys, *keys))


def differentiated_by_decomposition(key: str) -> bool:
    """Tell whether the aten operator ``key`` has no derivative formula of its own."""
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has(f"aten::{key}", "CompositeImplicitAutograd")) and not has(f"aten::{key}", "Autograd")


def where_gradient_ends(function: Callable[..., Any]) -> str:
    """Say where ``function`` computes something that autograd does not see, "" if it sees all of it.

    A ``torch.autograd.Function`` has its own backward, and torch differentiates calls of torch.  All functions that
    ``function`` reaches are searched for anything else that computes: a triton kernel, or an object that cannot be
    inspected.  In doubt the gradient counts as ended.
    """
    import torch

    pending: list[tuple[str, Any]] = [(getattr(function, "__name__", "it"), function)]
    seen: set[int] = set()
    while pending:
        name, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            if _foreign(value.__module__):
                continue
            ends = next((used for used in _used_names(value.__code__) if used in _ENDS_GRADIENT), "")
            if ends:
                return f"{name} uses {ends}"
            imported = next((m for m in _imports(value.__code__) if not _foreign(m)), "")
            if imported:
                return f"{name} imports {imported} when it is called"
            pending += _reached(value)
        elif isinstance(value, type):
            if not issubclass(value, torch.autograd.Function) and not _foreign(value.__module__):
                return f"{name} cannot be seen through"
        elif isinstance(value, ModuleType):
            if not _foreign(value.__name__):
                return f"the module {name} cannot be seen through"
        elif isinstance(value, BuiltinFunctionType):
            if not _foreign(value.__module__ or "builtins"):
                return f"{name} is compiled code"
        elif not _inert(value):
            return f"{name} is computed by a kernel of its own"
    return ""


def _foreign(module: str | None) -> bool:
    """Tell whether a module is torch's, triton's or Python's: torch differentiates its functions, or they only plan."""
    root = (module or "").partition(".")[0]
    return root in {"torch", "triton", "builtins", "math", "logging", "typing", "functools", "operator", "itertools"}


def _inert(value: Any) -> bool:
    import torch

    plain = (str, bytes, int, float, complex, bool, type(None), logging.Logger, torch.dtype, torch.device)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_inert(item) for item in value)
    if isinstance(value, dict):
        return all(_inert(item) for item in value.values())
    return isinstance(value, plain)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _used_names(code: CodeType) -> Iterator[str]:
    for part in _codes(code):
        yield from part.co_names


def _imports(code: CodeType) -> Iterator[str]:
    for part in _codes(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname == "IMPORT_NAME":
                yield str(instruction.argval)


def _reached(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what ``function`` can reach by name; a global with the same name as a used attribute is yielded too."""
    for name in _used_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a cell that was never filled
            continue
