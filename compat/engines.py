"""Hooks on verl's training engines: construction, initialise, and the phase in which they compute.

Every engine enters ``BaseEngineCtx`` in train and eval mode, no engine overrides ``train_batch`` or ``infer_batch``,
and ``EngineRegistry.new`` constructs all engines.  So a few hooks cover every backend of every release.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from verl_fl_overlay.errors import HookError
from verl_fl_overlay.events import Engine, engine_built, engine_initialized, failures
from verl_fl_overlay.hooks import Call, Hook, Wrapper
from verl_fl_overlay.phase import training

BASE = "verl.workers.engine.base"
UPSTREAM = "https://github.com/volcengine/verl/blob/v0.9.1/verl/workers/engine"


@dataclass(frozen=True)
class Backend:
    """One of verl's backends: the class that defines its ``initialize``, and the package that its module needs.

    ``floating_type`` is the attribute of that class for the type in which the model computes, "" if it has none.
    """

    owner: str
    needs: str = ""
    floating_type: str = ""

    def relies_on(self, module: str) -> tuple[str, ...]:
        """Return the attributes that ``told`` reads."""
        names = filter(None, ("module", "optimizer", self.floating_type))
        return tuple(f"{module}:{self.owner}.{name}" for name in names)


BACKENDS = {
    "fsdp": Backend("FSDPEngine", floating_type="_autocast_dtype"),
    "megatron": Backend("MegatronEngine", "megatron.core", "param_dtype"),  # other packages share the namespace
    "veomni": Backend("VeOmniEngine", "veomni"),
    "torchtitan": Backend("TorchTitanEngine", "torchtitan"),
    "automodel": Backend("AutomodelEngine", "nemo_automodel"),
}
"""verl's folder -> its backend.  VeOmni's engine inherits from FSDP's; engines not listed inherit from a listed one."""


def told(engine: Any, name: str, backend: Backend) -> Engine:
    """Return a description of an initialised ``engine`` of verl in torch's terms.

    If a changed verl no longer has an attribute, that is recorded, and the description leaves it out.
    """
    return Engine(
        name,
        models_of(_attribute(engine, "module")),
        _attribute(engine, "optimizer"),
        str(getattr(engine, backend.floating_type, "") if backend.floating_type else "").removeprefix("torch."),
    )


def models_of(module: Any) -> tuple[Any, ...]:
    """Return the torch modules in what verl keeps as one: Megatron and TorchTitan keep a list of them."""
    chunks = module if isinstance(module, list | tuple) else [module]
    return tuple(chunk for chunk in chunks if hasattr(chunk, "named_children"))


def _attribute(engine: Any, name: str) -> Any:
    try:
        return getattr(engine, name)
    except Exception as error:  # whatever a property of verl's raises
        whose = f"{type(engine).__module__}.{type(engine).__qualname__}"
        said = f"has no attribute {name}" if isinstance(error, AttributeError) else f"raises {error!r} for {name}"
        lost = HookError(f"verl's {whose} {said}: what the overlay does with it is left out")
        failures.record(f"{whose}.{name}", lost)
        return None


def _backend_of(engine: Any, registered: str) -> str:
    """Return the backend of ``engine``'s class or of its base class, else the name under which it was registered.

    An engine for Megatron that does not inherit verl's is known by the name of its module.
    """
    homes = (cls.__module__.removesuffix(".transformer_impl") for cls in type(engine).__mro__)
    found = (home.rpartition(".")[2] for home in homes if home.startswith("verl.workers.engine."))
    others = "megatron" if any("megatron" in cls.__module__.lower() for cls in type(engine).__mro__) else registered
    return next((name for name in found if name in BACKENDS), others)


def _new(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    engine = wrapped(*args, **kwargs)
    registered = kwargs.get("backend", args[1] if len(args) > 1 else "")
    engine_built.emit(Engine(_backend_of(engine, str(registered))))
    return engine


def _initialize(name: str, backend: Backend) -> Wrapper:
    def initialize(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with training.inside("initialize"):
            result = wrapped(*args, **kwargs)
        engine_initialized.emit(told(instance, name, backend))
        return result

    return initialize


def _enter(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # verl's own __enter__ runs first: it moves offloaded weights to the device, and that is not training.
    result = wrapped(*args, **kwargs)
    try:
        training.enter(str(_attribute(instance, "mode")))
    except BaseException:
        from verl.workers.engine.base import BaseEngineCtx

        # A with statement does not call __exit__ if __enter__ raised.  Only the base's __exit__ is called here: the
        # engine's own would undo things that its __enter__ has not done yet.
        BaseEngineCtx.__exit__(instance, *sys.exc_info())
        raise
    return result


def _exit(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        training.leave()
    finally:
        result = wrapped(*args, **kwargs)
    return result


def computing(mode: str) -> Wrapper:
    """Return a wrapper that runs a computing method inside the training phase."""

    def wrapper(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with training.inside(mode):
            return wrapped(*args, **kwargs)

    return wrapper


def class_for_cuda(registry: Any, device: str, model_type: str, backend: str) -> Any:
    """Return the engine class for CUDA; None if ``device`` has a class of its own, or CUDA has none."""
    by_device = registry._engines.get(model_type, {}).get(backend, {})
    if any(key == device or (isinstance(key, tuple) and key[0] == device) for key in by_device):
        return None
    return by_device.get("cuda") or by_device.get(("cuda", "nvidia"))


def base_hooks() -> list[Hook]:
    """Return the hooks on what all engines share."""
    hook = partial(Hook, module=BASE, feature="phase", required=True)
    modes = "verl has callbacks for entering and leaving an engine's mode"
    return [
        hook(
            name="engine.new",
            attribute="EngineRegistry.new",
            wrapper=_new,
            why="verl constructs every engine here; features are told of the new engine.",
            upstream=f"{UPSTREAM}/base.py#L432",
            until="verl calls a plugin when an engine is constructed",
        ),
        hook(
            name="engine.enter",
            attribute="BaseEngineCtx.__enter__",
            wrapper=_enter,
            why="verl enters an engine's train or eval mode here; the training phase goes one level in.",
            upstream=f"{UPSTREAM}/base.py#L330",
            until=modes,
            relies_on=(f"{BASE}:BaseEngineCtx.mode",),
            pair="engine.exit",
        ),
        hook(
            name="engine.exit",
            attribute="BaseEngineCtx.__exit__",
            wrapper=_exit,
            why="verl leaves the mode here, also after an exception; the training phase goes one level out.",
            upstream=f"{UPSTREAM}/base.py#L334",
            until=modes,
            pair="engine.enter",
        ),
        hook(
            name="engine.train_batch",
            attribute="BaseEngine.train_batch",
            wrapper=computing("train_batch"),
            why="verl runs one training step here; it is inside the training phase even where no mode was entered.",
            upstream=f"{UPSTREAM}/base.py#L113",
            until="verl has callbacks around a training step",
        ),
        hook(
            name="engine.infer_batch",
            attribute="BaseEngine.infer_batch",
            wrapper=computing("infer_batch"),
            why="verl computes log-probs or values without gradient here; it is inside the training phase.",
            upstream=f"{UPSTREAM}/base.py#L134",
            until="verl has callbacks around a forward pass",
        ),
    ]


def initialize_hook(name: str, *, floating_type: bool = True) -> Hook:
    """Return the hook on the ``initialize`` of a backend (a key of ``BACKENDS``).

    ``floating_type`` is False for a release in which the engines do not store that type.
    """
    backend = BACKENDS[name] if floating_type else replace(BACKENDS[name], floating_type="")
    module = f"verl.workers.engine.{name}.transformer_impl"
    return Hook(
        name=f"engine.initialize.{name}",
        module=module,
        attribute=f"{backend.owner}.initialize",
        wrapper=_initialize(name, backend),
        feature="phase",
        required=True,
        why="verl builds model, optimizer and scheduler here; it is inside the training phase, and features are told.",
        upstream=f"{UPSTREAM}/{name}/transformer_impl.py",
        until="verl calls a plugin when an engine is initialised",
        needs=backend.needs,
        relies_on=backend.relies_on(module),
    )
