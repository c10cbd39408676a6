"""The moment before a plugin for rollout reads its environment, in the processes of verl's rollout."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.events import rollout_plugin_found
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
