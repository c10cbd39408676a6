"""The CPU as a training device: the functions that verl expects of a torch device module and ``torch.cpu`` lacks."""

from __future__ import annotations

import os
import platform
import sys
from types import ModuleType
from typing import Any

from verl_fl_overlay.errors import SettingsError


class CurrentCpu(str):
    """The CPU as the current device: torch takes it for the device, and written behind "cpu:" it is the index 0.

    An accelerator's index serves as both.  Of the CPU torch refuses the number 0, and gives "cpu", which cannot be
    written behind "cpu:".
    """

    def __format__(self, spec: str) -> str:
        return format("0", spec)


class CpuModule(ModuleType):
    """``torch.cpu``, completed with the memory and random-number functions of an accelerator's module.

    Bytes are real ones: "allocated" is this process's resident memory, "reserved" its peak, "info" the host's.
    Everything that ``torch.cpu`` has itself comes from there.
    """

    def __init__(self) -> None:
        super().__init__("torch.cpu", __doc__)

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch.cpu, name)

    def current_device(self) -> str:
        """Return the CPU, as torch takes it and as an index behind "cpu:"."""
        return CurrentCpu("cpu")

    def empty_cache(self) -> None:
        """Do nothing: the host's allocator keeps no cache that could be given back."""

    def ipc_collect(self) -> None:
        """Do nothing: host memory is not shared by handles."""

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Do nothing: the kernel's peak cannot be reset."""

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        """Do nothing: the host does not divide its memory by process."""

    def memory_allocated(self, device: Any = None) -> int:
        """Return the resident memory of this process, bytes."""
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def max_memory_allocated(self, device: Any = None) -> int:
        """Return the largest resident memory this process has had, bytes."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Return the host's (free, total) memory, bytes."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def get_device_name(self, device: Any = None) -> str:
        """Return the processor's name, as the system tells it."""
        return platform.processor() or platform.machine()

    def get_device_capability(self, device: Any = None) -> tuple[None, None]:
        """Return (None, None): verl's own answer where there is no compute capability."""
        return None, None

    def get_rng_state(self, device: Any = None) -> Any:
        """Return the state of torch's CPU generator."""
        import torch

        return torch.get_rng_state()

    def set_rng_state(self, state: Any, device: Any = None) -> None:
        """Set the state of torch's CPU generator."""
        import torch

        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        """Seed torch's CPU generator."""
        import torch

        torch.manual_seed(seed)

    manual_seed_all = manual_seed


CPU_MODULE = CpuModule()
"""The one that every caller gets; it keeps nothing."""


def refuse_hidden_accelerator() -> None:
    """Raise if VERL_FL_DEVICE=cpu was asked for where torch sees CUDA, which verl took before the overlay was loaded.

    Raises:
        SettingsError: with the variable that hides the GPUs.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raise SettingsError(
            f"VERL_FL_DEVICE=cpu, but torch sees {torch.cuda.device_count()} CUDA device(s) and verl has already "
            "decided to use them. Hide them too: export CUDA_VISIBLE_DEVICES="
        )
