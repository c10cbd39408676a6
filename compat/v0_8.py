"""verl 0.8.0: the legacy workers are gone, Automodel is new, devices are still chosen by helper functions."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import engines, process_group, ray_env, rollout
from verl_fl_overlay.compat import flash_attn as attention
from verl_fl_overlay.compat import platforms as chips
from verl_fl_overlay.compat import token_logprobs as logprobs
from verl_fl_overlay.compat import without_accelerator as cpu
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line."""
    return [
        *engines.base_hooks(),
        *(engines.initialize_hook(backend) for backend in engines.ENGINES),
        attention.padding_hook(),
        attention.value_model_hook(),
        *(logprobs.logprobs_hook(c) for c in ("fsdp", "torchtitan", "automodel", "prefix_grouper")),
        *ray_env.ray_hooks(),
        rollout.plugin_hook(),
        *process_group.flagcx_hooks(),
        process_group.backend_name_hook(),
        *process_group.checkpoint_engine_hooks(),
        *chips.device_helper_hooks(),
        *cpu.shared_hooks(),
        *cpu.device_helper_hooks(),
    ]
