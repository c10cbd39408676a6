"""verl 0.7.0 and 0.7.1."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import (
    engines,
    flash_attn,
    legacy_workers,
    platforms,
    process_group,
    ray_env,
    rollout,
    token_logprobs,
    without_accelerator,
)
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line; TorchTitan and the prefix grouper arrived with 0.7.1."""
    backends = ["fsdp", "megatron", "veomni"]
    consumers = ["fsdp", "legacy_actor"]
    if version >= Version("0.7.1"):
        backends += ["torchtitan"]
        consumers += ["torchtitan", "prefix_grouper"]
    return [
        *engines.base_hooks(),
        *(engines.initialize_hook(backend, floating_type=backend != "fsdp") for backend in backends),
        *legacy_workers.hooks(),
        flash_attn.padding_hook(),
        flash_attn.value_model_hook(),
        *(token_logprobs.logprobs_hook(consumer) for consumer in consumers),
        *ray_env.ray_hooks(),
        rollout.plugin_hook(),
        *process_group.flagcx_hooks(),
        process_group.backend_name_hook(),
        *(process_group.checkpoint_engine_hooks() if version >= Version("0.7.1") else []),
        *platforms.device_helper_hooks(),
        *without_accelerator.shared_hooks(),
        *without_accelerator.device_helper_hooks(),
    ]
