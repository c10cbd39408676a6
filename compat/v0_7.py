"""verl 0.7.0 and 0.7.1."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import engines, legacy_workers, process_group, ray_env, rollout
from verl_fl_overlay.compat import flash_attn as attention
from verl_fl_overlay.compat import platforms as chips
from verl_fl_overlay.compat import token_logprobs as logprobs
from verl_fl_overlay.compat import without_accelerator as cpu
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
        *(engines.initialize_hook(backend) for backend in backends),
        *legacy_workers.hooks(),
        attention.padding_hook(),
        attention.value_model_hook(),
        *(logprobs.logprobs_hook(consumer) for consumer in consumers),
        *ray_env.ray_hooks(),
        rollout.plugin_hook(),
        *process_group.flagcx_hooks(),
        process_group.backend_name_hook(),
        *(process_group.checkpoint_engine_hooks() if version >= Version("0.7.1") else []),
        *chips.device_helper_hooks(),
        *cpu.shared_hooks(),
        *cpu.device_helper_hooks(),
    ]
