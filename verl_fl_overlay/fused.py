"""Puts fused kernels into a model: which modules get one, and how they are taken out again.

A module is recognised by its structure (the forward then checks its numbers before it relies on that), its parameters
and their names stay as they are, and whoever replaced a forward before us keeps it.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any

from verl_fl_overlay.events import engine_initialized
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.variables import FUSED

logger = logging.getLogger("verl_fl_overlay")

ROTARY = "apply_rotary_pos_emb"
"""What Hugging Face models call the function in each model's own file."""

LIGER = "liger_kernel"
"""The package whose fused classes and forwards verl puts in when use_liger is set."""


class FusedModules:
    """The modules of this process that run on a fused kernel."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.counts: Counter[str] = Counter()
        self._modules: list[Any] = []
        self._functions: list[tuple[ModuleType, Any, Any]] = []
        self._left_native: set[str] = set()

    def engine_initialized(self, engine: Any) -> None:
        """Fuse the model of an engine that verl has just built.

        Raises:
            ModuleNotFoundError: there is no Triton; what its import costs is paid here, and not in the first step.
        """
        from verl_fl_overlay import fused_forward

        fused_forward.kernels()
        for model in _models(engine):
            self.fuse(model)

    def fuse(self, model: Any) -> None:
        """Replace what is recognised in ``model`` (a torch module) and was not replaced before."""
        from verl_fl_overlay import fused_forward

        forwards = {"rms_norm": fused_forward.rms_norm, "gated_mlp": fused_forward.gated_mlp}
        before, name = self.counts.total(), type(model).__name__
        for module in model.modules():
            kind = recognise(module)
            if kind in self.kinds and _is_untouched(module):
                module.__dict__["forward"] = MethodType(forwards[kind], module)
                self._modules.append(module)
                self.counts[kind] += 1
        if "rotary" in self.kinds:
            for source in _sources(model):
                self._replace_rotary(source)
        if self.counts.total() == before and not self._modules and name not in self._left_native:
            self._left_native.add(name)
            logger.warning("no module of %s has a structure with a fused kernel; it runs natively", name)

    def remove(self) -> None:
        """Give every module and every file its own forward and function back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        for source, native, fused in self._functions:
            if getattr(source, ROTARY, None) is fused:
                setattr(source, ROTARY, native)
        self._modules.clear()
        self._functions.clear()
        self.counts.clear()

    def _replace_rotary(self, source: ModuleType) -> None:
        from verl_fl_overlay import fused_forward

        native = getattr(source, ROTARY)
        fused = fused_forward.rotary(native)
        setattr(source, ROTARY, fused)
        self._functions.append((source, native, fused))
        self.counts["rotary"] += 1


def recognise(module: Any) -> str:
    """Return "rms_norm" or "gated_mlp" for a module with that structure, "" for any other."""
    if not _takes_one_input(type(module).forward):
        return ""
    children = dict(module.named_children())
    if not children:
        weight = getattr(module, "weight", None)  # FSDP1 keeps it as a plain tensor, not as a parameter
        others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name != "weight"]
        one_dimensional = getattr(weight, "ndim", 0) == 1 and not others and getattr(module, "bias", None) is None
        return "rms_norm" if one_dimensional and epsilon(module) is not None else ""
    projections = {"gate_proj", "up_proj", "down_proj"}
    if projections <= set(children) <= {*projections, "act_fn"} and callable(getattr(module, "act_fn", None)):
        return "gated_mlp"
    return ""


def epsilon(module: Any) -> float | None:
    """Return what a norm adds to the variance, under either of its usual names; None if it has neither."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _takes_one_input(forward: Callable[..., Any]) -> bool:
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty]
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


def _models(engine: Any) -> list[Any]:
    model = getattr(engine, "module", None)
    chunks = model if isinstance(model, list | tuple) else [model]  # Megatron keeps a list of them
    return [chunk for chunk in chunks if hasattr(chunk, "named_children")]


_active: FusedModules | None = None


def start(settings: Settings) -> Callable[[], None]:
    """Fuse the model of every engine from now on; call what is returned to take all of it back."""
    global _active
    fused = _active = FusedModules(FUSED if settings.fused == ("auto",) else settings.fused)
    unsubscribe = engine_initialized.subscribe(fused.engine_initialized)

    def stop() -> None:
        global _active
        unsubscribe()
        fused.remove()
        _active = None

    return stop


def describe() -> dict[str, Any]:
    """Return how many modules (for rotary: model files) were given a kernel, and what each numerical check found."""
    forwards = sys.modules.get("verl_fl_overlay.fused_forward")
    return {
        "replaced": dict(_active.counts) if _active else {},
        "checks": forwards.checks() if forwards else {},
    }
