"""The engine that rollout is to use, and the moment before a plugin of it reads its environment."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.compat.ray_env import starts_here
from verl_fl_overlay.events import rollout_engine, rollout_plugin_found
from verl_fl_overlay.hooks import Call, Hook, Wrapper


def _found(package: str) -> Wrapper:
    def found(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rollout_plugin_found.emit(package)
        return wrapped(*args, **kwargs)

    return found


def plugin_hooks() -> list[Hook]:
    """Return what every release needs."""
    sglang, taken = "sglang-plugin-FL", "takes a list from the environment in place of the chip's own, whose operators"
    return [
        Hook(
            name="rollout.lists",
            module="vllm_fl",
            attribute="register",
            wrapper=_found("vllm_fl"),
            feature="rollout",
            required=False,
            why=f"vllm-plugin-FL {taken} come back into use; the chip's are added to it first, in the process where "
            "chip and plugin are.",
            upstream="https://github.com/flagos-ai/vllm-plugin-FL/blob/main/vllm_fl/utils.py",
            until="vllm-plugin-FL adds VLLM_FL_FLAGOS_BLACKLIST and VLLM_FL_OOT_BLACKLIST to its configuration's lists",
            needs="vllm_fl",
        ),
        *(
            Hook(
                name=name,
                module="sglang_fl",
                attribute=attribute,
                wrapper=_found("sglang_fl"),
                feature="rollout",
                required=False,
                why=f"{sglang} {taken} come back into use; the chip's are added to it first, {where}.",
                upstream="https://github.com/flagos-ai/sglang-plugin-FL/blob/main/sglang_fl/__init__.py",
                until=f"{sglang} adds SGLANG_FL_FLAGOS_BLACKLIST and SGLANG_FL_OOT_BLACKLIST to its configuration's "
                "lists",
                needs="sglang_fl",
                pair=pair,
            )
            for name, attribute, pair, where in (
                (
                    "rollout.sglang_platform",
                    "activate_platform",
                    "rollout.sglang_lists",
                    "in verl's server, which only asks for the platform and starts the processes that load the plugin",
                ),
                (
                    "rollout.sglang_lists",
                    "load_plugin",
                    "rollout.sglang_platform",
                    "where SGLang loads the plugin in a process that has the overlay",
                ),
            )
        ),
    ]


ENGINES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm"}
"""verl's name of a rollout engine -> the package that it imports; other names are somebody's own."""

USED = {
    "actor_rollout_ref.rollout": "",
    "reward.reward_model.rollout": "reward.reward_model.enable",
    "reward_model.rollout": "reward_model.enable",
}
"""Where a configuration has a rollout -> what tells whether it is used, "" if it always is."""


def _engine(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    (configuration,) = (*args, *kwargs.values())

    def find(key: str) -> Any:
        return OmegaConf.select(configuration, key) if OmegaConf.is_config(configuration) else None

    teachers = find("distillation.teacher_models") or ()
    used = USED | {f"distillation.teacher_models.{name}.inference": "distillation.enabled" for name in teachers}
    asked: dict[Any, str] = {}
    for rollout, switch in used.items():
        if not switch or find(switch):
            asked.setdefault(find(f"{rollout}.name"), f"{rollout}.name")
    for name, key in asked.items():
        if name in ENGINES:
            rollout_engine.ask(ENGINES[name], f"{key}={name}", starts_here(find("ray_kwargs.ray_init")))
    return wrapped(*args, **kwargs)


def engine_hook() -> Hook:
    """Return what every release needs."""
    return Hook(
        name="rollout.engine",
        module="verl.utils.device",
        attribute="auto_set_device",
        wrapper=_engine,
        feature="rollout_engine",
        required=False,
        why="verl says that vLLM or SGLang is missing or too old minutes later, in a worker; its trainers for "
        "reinforcement learning call this function with their configuration before they start Ray.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/trainer/main_ppo.py#L174",
        until="verl looks for the rollout engine before it starts Ray",
    )
