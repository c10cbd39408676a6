"""How much memory an accelerator has left for this process."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.devices.accelerator import accelerator

TOLD_BY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "reset_peak_memory_stats", "mem_get_info")
"""The functions of torch's module of an accelerator that tell of its memory."""


class DeviceMemory:
    """The memory of the accelerator of this process, in bytes.  No method waits for the device to finish its work."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def allocated(self) -> int:
        """Return what tensors of this process hold."""
        return int(self._module.memory_allocated())

    def peak(self) -> int:
        """Return the most that tensors of this process held since ``restart_peak``, or since the process began."""
        return int(self._module.max_memory_allocated())

    def restart_peak(self) -> None:
        """Look for the peak anew from now on.  Everybody in the process gets the new peak."""
        self._module.reset_peak_memory_stats()

    def available(self) -> int:
        """Return what this process can still allocate.

        It is what nobody holds on the device, other processes counted, and what torch keeps for its next tensors.
        """
        free, _ = self._module.mem_get_info()
        return int(free + self._module.memory_reserved() - self._module.memory_allocated())

    def total(self) -> int:
        """Return what the device has."""
        return int(self._module.mem_get_info()[1])


def device_memory() -> DeviceMemory | None:
    """Return the memory of the accelerator here; None on a CPU, and where torch does not tell of it."""
    module = accelerator()
    return DeviceMemory(module) if module is not None and all(hasattr(module, name) for name in TOLD_BY) else None
