"""verl 0.8.0: the legacy workers are gone, Automodel is new, devices are still chosen by helper functions."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import adapters, every_release, flash_attn, platforms, process_group
from verl_fl_overlay.compat import without_accelerator as cpu
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line."""
    return [
        *every_release.hooks(),
        flash_attn.padding_hook(),
        adapters.weights_hook(),
        adapters.everywhere_hook(),
        process_group.backend_name_hook(),
        *process_group.checkpoint_engine_hooks(),
        *platforms.device_helper_hooks(),
        *cpu.device_helper_hooks(),
    ]
