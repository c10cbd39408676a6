"""verl 0.9.0, 0.9.1 and, until a line of its own is needed, what comes next: a platform layer chooses the device."""

from __future__ import annotations

from packaging.version import Version

from verl_fl_overlay.compat import attention, cpu, engines, logprobs
from verl_fl_overlay.hooks import Hook


def hooks(version: Version) -> list[Hook]:
    """Return the hooks of this release line; 0.9.1 pads without flash-attn by itself."""
    return [
        *engines.base_hooks(),
        *(engines.initialize_hook(backend) for backend in engines.ENGINES),
        attention.value_model_hook(),
        *([attention.padding_hook()] if version < Version("0.9.1") else []),
        *(logprobs.logprobs_hook(c) for c in ("fsdp", "torchtitan", "automodel", "prefix_grouper")),
        *cpu.shared_hooks(),
        *cpu.platform_hooks(),
    ]
