"""verl 0.9.0, 0.9.1 and newer versions until one needs its own shim; a platform layer chooses the device."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import adapters, every_release, flash_attn, platforms, process_group
from verl_fl_overlay.compat import without_accelerator as cpu
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line; 0.9.1 pads without flash-attn by itself."""
    return [
        *every_release.hooks(),
        *([flash_attn.padding_hook()] if version < Version("0.9.1") else []),
        adapters.everywhere_hook(),
        *process_group.checkpoint_engine_hooks(),
        *platforms.platform_hooks(),
        *cpu.platform_hooks(),
    ]
