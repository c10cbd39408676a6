"""Hooks on verl's training engines: construction, initialise, and the phase in which they compute.

``BaseEngineCtx`` is entered by every engine's train and eval mode, ``train_batch``/``infer_batch`` are overridden by
none, and ``EngineRegistry.new`` constructs them all, so these few hold for every backend of every release.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from verl_fl_overlay.events import engine_built, engine_initialized
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.phase import training

BASE = "verl.workers.engine.base"
UPSTREAM = "https://github.com/volcengine/verl/blob/v0.9.1/verl/workers/engine"

Call = Callable[..., Any]


def _new(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    engine = wrapped(*args, **kwargs)
    engine_built.emit(engine)
    return engine


def _initialize(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with training.inside("initialize"):
        result = wrapped(*args, **kwargs)
    engine_initialized.emit(instance)
    return result


def _enter(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # After verl's own entering: it moves offloaded weights to the device, which is not training.
    result = wrapped(*args, **kwargs)
    try:
        training.enter(instance.mode)
    except BaseException:
        from verl.workers.engine.base import BaseEngineCtx

        # The with statement does not leave what it did not enter.  The base's leaving alone: an engine's own would undo
        # what its entering has not done yet.
        BaseEngineCtx.__exit__(instance, *sys.exc_info())
        raise
    return result


def _exit(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        training.leave()
    finally:
        result = wrapped(*args, **kwargs)
    return result


def _train_batch(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with training.inside("train_batch"):
        return wrapped(*args, **kwargs)


def _infer_batch(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with training.inside("infer_batch"):
        return wrapped(*args, **kwargs)


def class_for_cuda(registry: Any, device: str, model_type: str, backend: str) -> Any:
    """Return the engine class that serves CUDA; None where one is registered for ``device``, or none for CUDA."""
    by_device = registry._engines.get(model_type, {}).get(backend, {})
    if any(key == device or (isinstance(key, tuple) and key[0] == device) for key in by_device):
        return None
    return by_device.get("cuda") or by_device.get(("cuda", "nvidia"))


def base_hooks() -> list[Hook]:
    """Return the hooks on what all engines share."""
    return [
        Hook(
            name="engine.new",
            module=BASE,
            attribute="EngineRegistry.new",
            wrapper=_new,
            feature="phase",
            required=True,
            why="verl constructs every engine here; features are told of the new engine.",
            upstream=f"{UPSTREAM}/base.py#L432",
            until="verl calls a plugin when an engine is constructed",
        ),
        Hook(
            name="engine.enter",
            module=BASE,
            attribute="BaseEngineCtx.__enter__",
            wrapper=_enter,
            feature="phase",
            required=True,
            why="verl enters an engine's train or eval mode here; the training phase goes one level in.",
            upstream=f"{UPSTREAM}/base.py#L330",
            until="verl has callbacks for entering and leaving an engine's mode",
            relies_on=(f"{BASE}:BaseEngineCtx.mode",),
            pair="engine.exit",
        ),
        Hook(
            name="engine.exit",
            module=BASE,
            attribute="BaseEngineCtx.__exit__",
            wrapper=_exit,
            feature="phase",
            required=True,
            why="verl leaves the mode here, also after an exception; the training phase goes one level out.",
            upstream=f"{UPSTREAM}/base.py#L334",
            until="verl has callbacks for entering and leaving an engine's mode",
            pair="engine.enter",
        ),
        Hook(
            name="engine.train_batch",
            module=BASE,
            attribute="BaseEngine.train_batch",
            wrapper=_train_batch,
            feature="phase",
            required=True,
            why="verl runs one training step here; it is inside the training phase even where no mode was entered.",
            upstream=f"{UPSTREAM}/base.py#L113",
            until="verl has callbacks around a training step",
        ),
        Hook(
            name="engine.infer_batch",
            module=BASE,
            attribute="BaseEngine.infer_batch",
            wrapper=_infer_batch,
            feature="phase",
            required=True,
            why="verl computes log-probs or values without gradient here; it is inside the training phase.",
            upstream=f"{UPSTREAM}/base.py#L134",
            until="verl has callbacks around a forward pass",
        ),
    ]


ENGINES = {
    "fsdp": ("FSDPEngine", ""),
    "megatron": ("MegatronEngine", "megatron"),
    "veomni": ("VeOmniEngine", "veomni"),
    "torchtitan": ("TorchTitanEngine", "torchtitan"),
    "automodel": ("AutomodelEngine", "nemo_automodel"),
}
"""Backend -> the class that has its own ``initialize`` (the others inherit one of these), the package it needs."""


def initialize_hook(backend: str) -> Hook:
    """Return the hook on the ``initialize`` of ``backend`` (a key of ``ENGINES``)."""
    owner, needs = ENGINES[backend]
    return Hook(
        name=f"engine.initialize.{backend}",
        module=f"verl.workers.engine.{backend}.transformer_impl",
        attribute=f"{owner}.initialize",
        wrapper=_initialize,
        feature="phase",
        required=True,
        why="verl builds model, optimizer and scheduler here; it is inside the training phase, and features are told.",
        upstream=f"{UPSTREAM}/{backend}/transformer_impl.py",
        until="verl calls a plugin when an engine is initialised",
        needs=needs,
    )
