"""Where verl gives Ray the variables of its workers, and which variables the workers already have."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from verl_fl_overlay.events import runtime_env
from verl_fl_overlay.hooks import Call, Hook

SOURCE = "https://github.com/volcengine/verl/blob"


def _with_overlay(given: Mapping[str, Any] | None, elsewhere: Mapping[str, str]) -> Any:
    found = runtime_env.ask(given, elsewhere)
    return given if found is None else found


def _of_submitted_job() -> dict[str, str]:
    """Return the variables that ``ray job submit`` gave to this job; Ray refuses to take them a second time."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env") or {}
    return submitted.get("env_vars") or {}


def _of_running_job() -> dict[str, str]:
    """Return the variables that this process's Ray job or actor gives the actors it starts."""
    import ray

    return (ray.get_runtime_context().runtime_env or {}).get("env_vars") or {} if ray.is_initialized() else {}


def _of_job_config(job_config: Any) -> Any:
    """Return the runtime environment in ``ray.init``'s job_config; None if Ray uses a submitted job's instead."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    return None if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ else getattr(job_config, "runtime_env", None)


def starts_here(given: Mapping[str, Any] | None) -> bool:
    """Return whether ``ray.init(**given)`` starts a Ray of its own, whose processes all have this one's packages.

    It is False where that cannot be told: Ray is there already, a runtime environment brings more than variables, or
    Ray's own hook (RAY_RUNTIME_ENV_HOOK) may bring one.
    What has no value brings nothing: verl 0.9.1's configuration names ``py_executable`` without one.
    """
    import ray

    options = given or {}
    environment = {name: brought for name, brought in (options.get("runtime_env") or {}).items() if brought}
    if ray.is_initialized() or set(environment) - {"env_vars"} or "PYTHONPATH" in (environment.get("env_vars") or {}):
        return False
    if "RAY_RUNTIME_ENV_HOOK" in os.environ:
        return False
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address(options.get("address"), options.get("_temp_dir")) is None
    except Exception:  # an address of another kind, or a Ray without this function
        return False


def _ray_init(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("runtime_env") or _of_job_config(kwargs.get("job_config"))
    return wrapped(*args, **{**kwargs, "runtime_env": _with_overlay(given, _of_submitted_job())})


def _ppo_runtime_env(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _with_overlay(wrapped(*args, **kwargs), _of_submitted_job())


def _actor_options(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("runtime_env")  # an actor of others, which has none, is left alone
    environment = _with_overlay(given, _of_running_job()) if given else given
    return wrapped(*args, **{**kwargs, "runtime_env": environment} if given else kwargs)


def ray_hooks() -> list[Hook]:
    """Return what every release needs."""
    return [
        Hook(
            name="ray.init",
            module="ray",
            attribute="init",
            wrapper=_ray_init,
            feature="ray",
            required=False,
            why="verl's trainers start Ray without the stack's variables, so workers on a running cluster never load "
            "the overlay; they are added to the job's runtime environment.",
            upstream=f"{SOURCE}/v0.9.1/verl/trainer/sft_trainer_ray.py#L383",
            until="verl forwards VERL_USE_EXTERNAL_MODULES and the variables of its plugins",
        ),
        Hook(
            name="ray.ppo_runtime_env",
            module="verl.trainer.constants_ppo",
            attribute="get_ppo_ray_runtime_env",
            wrapper=_ppo_runtime_env,
            feature="ray",
            required=False,
            why="verl's PPO trainers ask here which variables Ray's workers get; the stack's are added.",
            upstream=f"{SOURCE}/v0.9.1/verl/trainer/constants_ppo.py#L105",
            until="verl forwards VERL_USE_EXTERNAL_MODULES and the variables of its plugins",
        ),
        Hook(
            name="ray.actor_options",
            module="ray.actor",
            attribute="ActorClass.options",
            wrapper=_actor_options,
            feature="ray",
            required=False,
            why="Where Ray was started before verl was imported, the job lacks the variables.  verl starts its workers "
            "and all rollout servers, prefill and decode among them, with a runtime environment, which gets them.",
            upstream=f"{SOURCE}/v0.9.1/verl/workers/rollout/sglang_rollout/sglang_pd_replica.py#L208",
            until="verl forwards VERL_USE_EXTERNAL_MODULES and the variables of its plugins",
        ),
    ]
