"""Puts fused kernels into a model and its optimizer: what gets one, and how they are taken out again.

A module is recognised by its structure (the forward then checks its numbers before it relies on that), its parameters
and their names stay as they are, and whoever replaced a forward before us keeps it.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

from verl_fl_overlay.events import Engine
from verl_fl_overlay.kernels.adam import FusedAdam

logger = logging.getLogger("verl_fl_overlay")

ADAM = "adam"
"""The kind that is the optimizer's; the others are the model's."""

ROTARY = "apply_rotary_pos_emb"
"""What Hugging Face models call the function in each model's own file."""

EPSILON = ("variance_epsilon", "eps")
"""What norms call the number that they add to the variance."""

LIGER = "liger_kernel"
"""The package whose fused classes and forwards verl puts in when use_liger is set."""


class FusedModules:
    """The modules and optimizers of this process that may run on a fused kernel."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.counts: Counter[str] = Counter()
        self._optimizers = FusedAdam()
        self._modules: WeakSet[Any] = WeakSet()  # a model that verl has dropped is not kept
        self._functions: list[tuple[ModuleType, Any, Any]] = []
        self._left_native: set[str] = set()

    def engine_initialized(self, engine: Engine) -> None:
        """Fuse the optimizer and the model of an engine that verl has just built.

        Raises:
            ModuleNotFoundError: there is no Triton; what its import costs is paid here, and not in the first step.
        """
        if ADAM in self.kinds and self._optimizers.fuse(engine.optimizer):
            self.counts[ADAM] += 1
        if self.kinds == (ADAM,):
            return
        from verl_fl_overlay.kernels import forward as fused_forward

        fused_forward.kernels()
        for model in engine.models:
            self.fuse(model)

    def fuse(self, model: Any) -> None:
        """Replace what is recognised in ``model`` (a torch module) and was not replaced before."""
        from verl_fl_overlay.kernels import forward as fused_forward

        forwards = {"rms_norm": fused_forward.rms_norm, "gated_mlp": fused_forward.gated_mlp}
        before, name = self.counts.total(), type(model).__name__
        for module in model.modules():
            kind = recognise(module)
            if kind in self.kinds and _is_untouched(module):
                module.__dict__["forward"] = MethodType(forwards[kind], module)
                self._modules.add(module)
                self.counts[kind] += 1
        if "rotary" in self.kinds:
            for source in _sources(model):
                self._replace_rotary(source)
        if self.counts.total() == before and not self._modules and name not in self._left_native:
            self._left_native.add(name)
            logger.warning("no module of %s has a structure with a fused kernel; it runs natively", name)

    def remove(self) -> None:
        """Give every module, file and optimizer its own forward, function and way to step back."""
        self._optimizers.remove()
        for module in self._modules:
            module.__dict__.pop("forward", None)
        for source, native, fused in self._functions:
            if getattr(source, ROTARY, None) is fused:
                setattr(source, ROTARY, native)
        self._modules.clear()
        self._functions.clear()
        self.counts.clear()

    def _replace_rotary(self, source: ModuleType) -> None:
        from verl_fl_overlay.kernels import forward as fused_forward

        native = getattr(source, ROTARY)
        fused = fused_forward.rotary(native)
        setattr(source, ROTARY, fused)
        self._functions.append((source, native, fused))
        self.counts["rotary"] += 1


def recognise(module: Any) -> str:
    """Return "rms_norm" or "gated_mlp" for a module with that structure, "" for any other.

    Its forward may read no other state of the module: one that does, a limit or a factor, can differ between two
    modules of a class, of which only one is checked.
    """
    if not _takes_one_input(type(module).forward):
        return ""
    children = dict(module.named_children())
    if not children:
        weight = getattr(module, "weight", None)  # FSDP1 keeps it as a plain tensor, not as a parameter
        others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != "weight"]
        one_dimensional = getattr(weight, "ndim", 0) == 1 and not others and getattr(module, "bias", None) is None
        usual = epsilon(module) is not None and _reads(module) <= {"weight", *EPSILON, "normalized_shape"}
        return "rms_norm" if one_dimensional and usual else ""
    projections = {"gate_proj", "up_proj", "down_proj"}
    activation = getattr(module, "act_fn", None)
    if projections <= set(children) <= {*projections, "act_fn"} and callable(activation):
        own = "act_fn" not in children or _reads(activation) <= {"inplace"}
        return "gated_mlp" if own and _reads(module) <= {*projections, "act_fn"} else ""
    return ""


def _reads(module: Any) -> set[str]:
    """Return the names of the module's state that its forward, and the methods which that calls, may read."""
    from torch import nn

    classes = [cls for cls in type(module).__mro__ if cls not in (nn.Module, object)]
    names, unread = set(), {"forward"}
    while unread:
        names |= unread
        defined = [vars(cls)[name] for cls in classes for name in unread if name in vars(cls)]
        unread = {name for each in defined for name in _names(each)} - names
    return names & {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _names(defined: Any) -> Iterator[str]:
    """Yield every name in the code of a method, or of a property, and of the functions inside it."""
    code = getattr(inspect.unwrap(getattr(defined, "fget", defined)), "__code__", defined)
    if isinstance(code, CodeType):
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names(constant)


def epsilon(module: Any) -> float | None:
    """Return what a norm adds to the variance, under one of its usual names; None if it has none."""
    for name in EPSILON:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _takes_one_input(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return len(parameters) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _is_untouched(module: Any) -> bool:
    """Whether the forward is what the module's class came with, and that class is not a fused one already."""
    home = type(module).forward.__module__
    own = home in {cls.__module__ for cls in type(module).__mro__}
    return own and home.partition(".")[0] != LIGER and "forward" not in vars(module)


def _sources(model: Any) -> Iterator[ModuleType]:
    """Yield the files that define the model's classes and a rotary function of their own that is still there."""
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        function = getattr(sys.modules.get(name), ROTARY, None)
        if function is None or function.__module__ != name:  # somebody else's, or ours already
            continue
        if list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]:
            yield sys.modules[name]
