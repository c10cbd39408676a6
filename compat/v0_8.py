"""verl 0.8.0: the legacy workers are gone, Automodel is new, devices are still chosen by helper functions."""

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
    """Return the hooks of this release line."""
    return [
        *engines.base_hooks(),
        *(engines.initialize_hook(backend) for backend in engines.BACKENDS),
        flash_attn.padding_hook(),
        flash_attn.value_model_hook(),
        *(token_logprobs.logprobs_hook(c) for c in ("fsdp", "torchtitan", "automodel", "prefix_grouper")),
        *ray_env.ray_hooks(),
        rollout.plugin_hook(),
        *process_group.flagcx_hooks(),
        process_group.backend_name_hook(),
        *process_group.checkpoint_engine_hooks(),
        *platforms.device_helper_hooks(),
        *without_accelerator.shared_hooks(),
        *without_accelerator.device_helper_hooks(),
    ]
