"""Puts fused kernels into a model, and takes them out again.

A kind of module is a file of its name beside this one, with ``recognise`` and ``forward``.  A module is recognised by
its structure, and its kernel is checked at its first call.  Parameters and their names do not change.  If other code
has already replaced a forward, that forward stays.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakSet

from verl_fl_overlay.kernels import rotary
from verl_fl_overlay.kernels.agreement import Agreement

logger = logging.getLogger("verl_fl_overlay")

ROTARY = "rotary"
"""The kind that is a function in a model's file, and not a module."""

LIGER = "liger_kernel"
"""The package of the fused classes and forwards that verl puts in when use_liger is set."""


class FusedModules:
    """The modules of models of this process, and the functions in their files, that may run on a fused kernel.

    Attributes:
        counts: how many there are of each kind, {"rms_norm": 57, "gated_mlp": 28, "rotary": 1}.
    """

    def __init__(self, kinds: tuple[str, ...], agreement: Agreement) -> None:
        self.counts: Counter[str] = Counter()
        files = {kind: importlib.import_module(f"{__package__}.{kind}") for kind in kinds}
        self._of_modules = {kind: file for kind, file in files.items() if hasattr(file, "recognise")}
        self._rotates = ROTARY in kinds
        self._agreement = agreement
        self._modules: WeakSet[Any] = WeakSet()  # a model that verl has dropped is not kept
        self._functions: list[Any] = []
        self._left_native: set[str] = set()

    def fuse(self, model: Any) -> None:
        """Replace what is recognised in ``model`` (a torch module) and was not replaced before.

        Raises:
            ModuleNotFoundError: there is no Triton.  It is imported here, so that the first step does not take longer.
        """
        if not self._of_modules and not self._rotates:
            return
        before, name = self.counts.total(), type(model).__name__
        for module in model.modules():
            for kind, forward in self._forwards.items():
                if _is_untouched(module) and self._of_modules[kind].recognise(module):
                    module.__dict__["forward"] = MethodType(forward, module)
                    self._modules.add(module)
                    self.counts[kind] += 1
        for function in rotary.functions(model) if self._rotates else ():
            rotary.replace(function, self._agreement)
            self._functions.append(function)
            self.counts[ROTARY] += 1
        if self.counts.total() == before and not self._modules and name not in self._left_native:
            self._left_native.add(name)
            logger.warning("no module of %s has a structure with a fused kernel; it runs natively", name)

    @functools.cached_property
    def _forwards(self) -> dict[str, Callable[..., Any]]:
        return {kind: file.forward(self._agreement) for kind, file in self._of_modules.items()}

    def remove(self) -> None:
        """Restore every function, and every module's forward unless other code has replaced ours since."""
        for module in self._modules:
            if getattr(vars(module).get("forward"), "__func__", None) in self._forwards.values():
                del module.__dict__["forward"]
        for function in self._functions:
            rotary.restore(function)
        self._modules.clear()
        self._functions.clear()
        self.counts.clear()


def _is_untouched(module: Any) -> bool:
    """Whether the forward is the one that the module's class defines, takes one input, and is not fused already."""
    forward = type(module).forward
    home = forward.__module__
    own = home in {cls.__module__ for cls in type(module).__mro__} and "forward" not in vars(module)
    parameters = inspect.signature(forward).parameters.values()
    takes_one = len(parameters) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return own and takes_one and home.partition(".")[0] != LIGER
