"""Hooks on the legacy workers: verl 0.7.0 and 0.7.1 train with them by default, 0.8.0 has removed them.

The hooks are on the classes that compute; the Ray-facing workers build these in their own process.  A hook on the class
of a Ray actor would be lost when Ray pickles it.  The reference policy is a PPO actor object without an optimizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from verl_fl_overlay.compat.engines import BACKENDS, computing, models_of
from verl_fl_overlay.events import Engine, engine_built, engine_initialized
from verl_fl_overlay.hooks import Call, Hook, Wrapper
from verl_fl_overlay.phase import training

UPSTREAM = "https://github.com/volcengine/verl/blob/v0.7.1/verl/workers"


_train, _infer = computing("train"), computing("eval")


def _build(backend: str) -> Wrapper:
    def build(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine_built.emit(Engine(backend))  # the worker stands for an engine
        with training.inside("initialize"):
            built = wrapped(*args, **kwargs)
        model, optimizer = built[:2]
        steps = hasattr(optimizer, "param_groups")  # for a reference Megatron returns a configuration
        engine_initialized.emit(Engine(backend, models_of(model), optimizer if steps else None, legacy=True))
        return built

    return build


STEPS = {
    "actor.dp_actor": ("DataParallelPPOActor", {"update_policy": _train, "compute_log_prob": _infer}),
    "actor.megatron_actor": ("MegatronPPOActor", {"update_policy": _train, "compute_log_prob": _infer}),
    "critic.dp_critic": ("DataParallelPPOCritic", {"update_critic": _train, "compute_values": _infer}),
    "critic.megatron_critic": ("MegatronPPOCritic", {"update_critic": _train, "compute_values": _infer}),
}
"""Module below verl.workers -> the class that computes, its steps and their wrappers."""

BUILDERS = {
    "ActorRolloutRefWorker": "_build_model_optimizer",
    "CriticWorker": "_build_critic_model_optimizer",
}
"""Ray-facing worker -> its method that builds model and optimizer."""


def hooks() -> list[Hook]:
    """Return the hooks on the steps of actors and critics, and on the building of their models."""
    hook = partial(Hook, feature="phase", required=True, until="verl 0.8.0, which has no legacy workers")
    steps = [
        hook(
            name=f"legacy.{module.split('.')[1]}.{method}",
            module=f"verl.workers.{module}",
            attribute=f"{owner}.{method}",
            wrapper=wrapper,
            why="verl 0.7's default workers compute here and enter no engine; it is inside the training phase.",
            upstream=f"{UPSTREAM}/{module.replace('.', '/')}.py",
            needs=BACKENDS["megatron"].needs if "megatron" in module else "",
        )
        for module, (owner, methods) in STEPS.items()
        for method, wrapper in methods.items()
    ]
    builders = [
        hook(
            name=f"legacy.{backend}.{method.strip('_')}",
            module=f"verl.workers.{backend}_workers",
            attribute=f"{owner}.{method}",
            wrapper=_build(backend),
            why="verl 0.7's default workers build their models here, inside the training phase; features are told.",
            upstream=f"{UPSTREAM}/{backend}_workers.py",
            needs=BACKENDS[backend].needs,
        )
        for backend in ("fsdp", "megatron")
        for owner, method in BUILDERS.items()
    ]
    return [*steps, *builders]
