"""The moment before vllm-plugin-FL reads its environment, in the processes of verl's rollout."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.events import rollout_plugin_found
from verl_fl_overlay.hooks import Call, Hook


def _register(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rollout_plugin_found.emit()
    return wrapped(*args, **kwargs)


def plugin_hook() -> Hook:
    """Return what every release needs."""
    return Hook(
        name="rollout.lists",
        module="vllm_fl",
        attribute="register",
        wrapper=_register,
        feature="rollout",
        required=False,
        why="vllm-plugin-FL takes a list from the environment in place of the chip's own, whose operators come back "
        "into use; the chip's are added to it first, in the process where chip and plugin are.",
        upstream="https://github.com/flagos-ai/vllm-plugin-FL/blob/main/vllm_fl/utils.py",
        until="vllm-plugin-FL adds VLLM_FL_FLAGOS_BLACKLIST and VLLM_FL_OOT_BLACKLIST to its configuration's lists",
        needs="vllm_fl",
    )
