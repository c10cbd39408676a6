"""verl 0.7.0 and 0.7.1."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import (
    adapters,
    engines,
    every_release,
    flash_attn,
    legacy_workers,
    micro_batch,
    packing,
    platforms,
    process_group,
)
from verl_fl_overlay.compat import without_accelerator as cpu
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line; TorchTitan and the prefix grouper arrived with 0.7.1."""
    first = version < Version("0.7.1")
    backends = ("fsdp", "megatron", "veomni") if first else ("fsdp", "megatron", "veomni", "torchtitan")
    consumers = ("fsdp", "legacy_actor") if first else ("fsdp", "legacy_actor", "torchtitan", "prefix_grouper")
    initialize = [engines.initialize_hook(name, floating_type=name != "fsdp") for name in backends]
    since_0_7_1 = [adapters.weights_hook(), adapters.everywhere_hook(), *process_group.checkpoint_engine_hooks()]
    return [
        *every_release.hooks(initialize, consumers),
        *legacy_workers.hooks(),
        *packing.worker_hooks(),
        *micro_batch.worker_hooks(),
        flash_attn.padding_hook(),
        process_group.backend_name_hook(),
        *([] if first else since_0_7_1),
        *platforms.device_helper_hooks(),
        *cpu.device_helper_hooks(),
    ]
