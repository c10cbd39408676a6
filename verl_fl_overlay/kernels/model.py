"""Puts fused kernels into a model, and takes them out again.

A kind of module is a file of its name beside this one, with ``METHOD``, ``recognise`` and ``in_place_of``.  A module is
recognised by its structure, and its kernel is checked at its first call.  The method is replaced in the class that
defines it, and runs on the kernel for the modules that were recognised: nothing is written into a module, so that
pickles and copies hold nothing of the overlay, and run natively.  If other code has already replaced a method, that
method stays.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from verl_fl_overlay.kernels import rotary
from verl_fl_overlay.kernels.agreement import Agreement

logger = logging.getLogger("verl_fl_overlay")

ROTARY = "rotary"
"""The kind that is a function in a model's file, and not a module."""

LIGER = "liger_kernel"
"""The package of the fused classes and forwards that verl puts in when use_liger is set."""


class FusedModules:
    """The modules of models of this process, and the functions in their files, that may run on a fused kernel."""

    def __init__(self, kinds: tuple[str, ...], agreement: Agreement) -> None:
        files = {kind: importlib.import_module(f"{__package__}.{kind}") for kind in kinds}
        self._of_modules = {kind: file for kind, file in files.items() if hasattr(file, "recognise")}
        self._rotates = ROTARY in kinds
        self._agreement = agreement
        self._methods: dict[tuple[type, str], _Method] = {}
        self._functions: list[Any] = []
        self._left_native: set[str] = set()

    @property
    def counts(self) -> Counter[str]:
        """How many there are of each kind, {"rms_norm": 57, "gated_mlp": 28, "rotary": 1}."""
        counts = Counter({ROTARY: len(self._functions)})
        for method in self._methods.values():
            counts[method.kind] += len(method.modules)
        return +counts

    @property
    def running(self) -> Counter[str]:
        """How many of these have run on a kernel."""
        rotating = (self._agreement.agrees_somewhere(ROTARY, each.__wrapped__) for each in self._functions)
        counts = Counter({ROTARY: sum(rotating)})
        for method in self._methods.values():
            counts[method.kind] += sum(module.has_run for module in method.modules.values())
        return +counts

    def fuse(self, model: Any) -> None:
        """Replace what is recognised in ``model`` (a torch module) and was not replaced before.

        Raises:
            ModuleNotFoundError: there is no Triton.  It is imported here, so that the first step does not take longer.
        """
        if not self._of_modules and not self._rotates:
            return
        before, name, others = self.counts.total(), type(model).__name__, set()
        for module in model.modules():
            for kind, file in self._of_modules.items():
                if structure := file.recognise(module):
                    if method := self._method_of(module, kind, file):
                        method.modules.setdefault(module, _Module(structure))
                    else:
                        others |= _replaced_by(module, file.METHOD)
        for function in rotary.functions(model) if self._rotates else ():
            rotary.replace(function, self._agreement)
            self._functions.append(function)
        if self.counts.total() == before and name not in self._left_native:
            self._left_native.add(name)
            if others:
                logger.info("%s runs on what %s put in; nothing is left to fuse", name, ", ".join(sorted(others)))
            elif not before:
                logger.warning("no module of %s has a structure with a fused kernel; it runs natively", name)

    def _method_of(self, module: Any, kind: str, file: ModuleType) -> _Method | None:
        """Return the replaced method that ``module`` runs, replacing it first; None if it is not its class's own."""
        name = file.METHOD
        owner = next((cls for cls in type(module).__mro__ if name in vars(cls)), None)
        if owner is None or name in vars(module):
            return None
        if (owner, name) not in self._methods and _is_own(module, owner, name):
            self._methods[owner, name] = _Method(kind, owner, file, self._agreement)
        method = self._methods.get((owner, name))
        return method if method is not None and method.kind == kind else None

    def remove(self) -> None:
        """Restore every function, and every class's method unless other code has replaced ours since."""
        for method in self._methods.values():
            method.remove()
        for function in self._functions:
            rotary.restore(function)
        self._methods.clear()
        self._functions.clear()


class _Module:
    """What is known of a module that was recognised.

    Attributes:
        structure: what ``recognise`` found.
        has_run: it has run on the kernel.
    """

    __slots__ = ("has_run", "structure")

    def __init__(self, structure: Any) -> None:
        self.structure, self.has_run = structure, False


class _Method:
    """A method of a class in whose place the kernel runs, for those of its modules that were recognised.

    A subclass that calls it, a copy of a module, and what was kept of it after ``remove`` run natively.

    Attributes:
        kind: of module.
        modules: those that were recognised; a model that verl has dropped is not kept.
    """

    def __init__(self, kind: str, owner: type, file: ModuleType, agreement: Agreement) -> None:
        self.kind, self._owner, self._name = kind, owner, file.METHOD
        self._native = native = vars(owner)[self._name]
        self.modules = modules = WeakKeyDictionary[Any, _Module]()
        run = file.in_place_of(native, agreement)

        @functools.wraps(native, assigned=("__name__", "__qualname__", "__doc__"))
        def method(self: Any, *inputs: Any, **named: Any) -> Any:
            if not torch.compiler.is_compiling() and len(inputs) == 1 and not named and (module := modules.get(self)):
                result = run(self, module.structure, inputs[0])
                if result is not None:
                    module.has_run = True
                    return result
            return native(self, *inputs, **named)

        self._method = method
        setattr(owner, self._name, method)

    def remove(self) -> None:
        """Put the native method back."""
        if vars(self._owner).get(self._name) is self._method:
            setattr(self._owner, self._name, self._native)
        self.modules.clear()


def _is_own(module: Any, owner: type, name: str) -> bool:
    """Whether the method comes from a package of the module's classes, not from Liger, and takes one input."""
    method: Callable[..., Any] = vars(owner)[name]
    parameters = inspect.signature(method).parameters.values()
    takes_one = len(parameters) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return takes_one and _package(method) in {_package(cls) for cls in type(module).__mro__} - {LIGER}


def _replaced_by(module: Any, name: str) -> set[str]:
    """Return the package whose method the module runs, if it is not one of its classes', or if it is Liger."""
    package = _package(getattr(module, name))
    return {package} - {_package(cls) for cls in type(module).__mro__ if _package(cls) != LIGER}


def _package(of: Any) -> str:
    return str(of.__module__).partition(".")[0]
