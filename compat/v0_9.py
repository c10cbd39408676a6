"""verl 0.9.0, 0.9.1 and, until a line of its own is needed, what comes next: a platform layer chooses the device."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import (
    engines,
    flash_attn,
    platforms,
    process_group,
    ray_env,
    rollout,
    token_logprobs,
    without_accelerator,
)
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line; 0.9.1 pads without flash-attn by itself."""
    return [
        *engines.base_hooks(),
        *(engines.initialize_hook(backend) for backend in engines.BACKENDS),
        flash_attn.value_model_hook(),
        *([flash_attn.padding_hook()] if version < Version("0.9.1") else []),
        *(token_logprobs.logprobs_hook(c) for c in ("fsdp", "torchtitan", "automodel", "prefix_grouper")),
        *ray_env.ray_hooks(),
        *ray_env.rollout_hooks(),
        rollout.plugin_hook(),
        *process_group.flagcx_hooks(),
        *process_group.checkpoint_engine_hooks(),
        *platforms.platform_hooks(),
        *without_accelerator.shared_hooks(),
        *without_accelerator.platform_hooks(),
    ]
