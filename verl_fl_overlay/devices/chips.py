"""The table of the FlagOS stack's chips: the names that components give each chip, and how to detect it."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay import packages
from verl_fl_overlay.devices.cpu import CPU_MODULE
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.stack import VENDOR_NAMES


@dataclass(frozen=True)
class Chip:
    """One vendor's chip.

    ``vendor`` is FlagGems' name, ``device`` torch's, ``backend`` the vendor's own collectives in torch ("" where none
    is known).  ``package`` is what brings ``torch.<device>``: a package, or torch's own build for the chip
    ("torch+xpu"); "" where any torch has it.  ``tools`` are the vendor's tools that list the chips, one is enough (none
    where another vendor's has the same name), ``ray_resource`` is what Ray calls them, ``ipc`` whether processes can
    share their memory.
    """

    vendor: str
    device: str
    backend: str
    visible_devices: str
    package: str
    tools: tuple[str, ...] = ()
    ray_resource: str = "GPU"
    ipc: bool = False

    @property
    def on_rocm(self) -> bool:
        """Whether torch calls the chip cuda and reaches it through ROCm."""
        return self.visible_devices == "HIP_VISIBLE_DEVICES"


CHIPS = {
    chip.vendor: chip
    for chip in (
        Chip("ascend", "npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES", "torch_npu", ("npu-smi",), "NPU"),
        Chip("mthreads", "musa", "mccl", "MUSA_VISIBLE_DEVICES", "torch_musa", ("mthreads-gmi",)),
        Chip("cambricon", "mlu", "cncl", "MLU_VISIBLE_DEVICES", "torch_mlu", ("cnmon",), ipc=True),
        Chip("enflame", "gcu", "eccl", "TOPS_VISIBLE_DEVICES", "torch_gcu", ("efsmi",), ipc=True),
        Chip("tsingmicro", "txda", "", "TXDA_VISIBLE_DEVICES", "torch_txda", ("tsm_smi",), "TXDA"),
        Chip("sunrise", "ptpu", "pccl", "PTPU_VISIBLE_DEVICES", "torch_ptpu", ("pt_smi", "pt-smi"), "PTPU"),
        Chip("biren", "supa", "bccl", "SUPA_VISIBLE_DEVICES", "torch_supa", ("brsmi",)),
        Chip("intel", "xpu", "xccl", "ZE_AFFINITY_MASK", "torch+xpu"),
        Chip("flagos", "flagos", "flagos", "CUDA_VISIBLE_DEVICES", "torch_fl"),
        Chip("metax", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", ("mx-smi",)),
        Chip("iluvatar", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", ("ixsmi",)),
        Chip("thead", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", ("ppu-smi",)),
        Chip("hygon", "cuda", "nccl", "HIP_VISIBLE_DEVICES", "", ("hy-smi",)),
        Chip("amd", "cuda", "nccl", "HIP_VISIBLE_DEVICES", "", ("rocm-smi",)),
        Chip("nvidia", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", ("nvidia-smi",)),
        Chip("kunlunxin", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", ("xpu-smi",)),
    )
}
"""FlagGems' name of the vendor -> its chip.

Chips with a package or tool of their own come first.  Kunlunxin's tool has the same name as Intel's, and that may also
be on an NVIDIA machine.  ``flagos`` is torch_fl's one device for the chips of several vendors; a vendor's own package
goes before it.
"""


CPU = Chip("cpu", "cpu", "gloo", "CUDA_VISIBLE_DEVICES", "", ray_resource="CPU")
"""The chip of VERL_FL_DEVICE=cpu.  No variable makes CPUs visible, so it has the one that Ray sets for its workers."""

NOTHING = "no vendor's package or tool is there"
"""What tells that a machine has no chip; any other text without a chip names one that is not known here."""

FLAGCX = "flagcx"
"""What torch calls FlagCX's collectives, which serve any chip."""

KNOWN_TO_VERL = {"ascend": "huawei", "amd": "amd", "nvidia": "nvidia"}
"""Vendors for which verl has its own platform -> what verl and VERL_PLATFORM call it."""


def _installed(package: str) -> bool:
    name, _, build = package.partition("+")
    return _build(name) == build if build else packages.installed(name)


@functools.cache
def _build(package: str) -> str:
    """Return the build that an installed package's version names, such as xpu of 2.9.0+xpu; it takes milliseconds."""
    return packages.version(package).partition("+")[2]


def find(
    environment: Mapping[str, str] | None = None,
    *,
    installed: Callable[[str], bool] = _installed,
    command: Callable[[str], str | None] = shutil.which,
) -> tuple[Chip | None, str]:
    """Return the chip of this machine and how it was detected; (None, ...) if there is none.

    No vendor's package is imported.  It is decided in FlagGems' order: T-Head's PPU_SDK, then GEMS_VENDOR under any of
    its names, then an installed package, then a vendor's tool.  A vendor that is named and not known here is no chip:
    what else is found may be another vendor's.  torch_fl sets GEMS_VENDOR itself, so a vendor whose own package is
    missing beside torch_fl is torch_fl's device.
    """
    environment = os.environ if environment is None else environment
    if "PPU_SDK" in environment:
        return CHIPS["thead"], "PPU_SDK is set"
    for variable in VENDOR_NAMES:
        named = environment.get(variable, "").strip().lower()
        chip = CHIPS.get(named)
        if named and chip is None:
            return None, f"{variable}={named} is no vendor that is known here"
        if chip and chip.package and not installed(chip.package) and installed("torch_fl"):
            return CHIPS["flagos"], f"{variable}={named}, and of torch_fl and {chip.package} only torch_fl is installed"
        if chip:
            return chip, f"{variable}={named}"
    return _on_this_machine(installed, command, os.environ.get("PATH"), tuple(sys.path))


@functools.cache
def _on_this_machine(
    installed: Callable[[str], bool], command: Callable[[str], str | None], *searched: Any
) -> tuple[Chip | None, str]:
    """Ask the file system once for these search paths: it takes milliseconds, and an activation asks several times."""
    for chip in CHIPS.values():
        if chip.package and installed(chip.package):
            return chip, f"{chip.package} is installed"
    for chip in CHIPS.values():
        for tool in filter(command, chip.tools):
            return chip, f"{tool} is there"
    return None, NOTHING


def called(name: str) -> Chip | None:
    """Return the chip with the vendor ``name``, FlagGems' or verl's, or with the device ``name`` if only one has it."""
    for chip in CHIPS.values():
        if name in (chip.vendor, KNOWN_TO_VERL.get(chip.vendor), chip.device if chip.package else None):
            return chip
    return None


def chosen(settings: Settings) -> tuple[Chip | None, str]:
    """Return the chip that training is to run on, and what decided that; (None, ...) if nothing does.

    VERL_FL_DEVICE=cpu decides first, then VERL_PLATFORM, then what is found on this machine.
    """
    if settings.device == "cpu":
        return CPU, "VERL_FL_DEVICE=cpu"
    named = settings["VERL_PLATFORM"].lower()
    if not named:
        return find()
    chip = called(named)
    return chip, f"VERL_PLATFORM={named}{'' if chip else ' is no chip that is known here'}"


def without_platform(settings: Settings) -> Chip | None:
    """Return the chip that training is to run on if verl has no platform for it, else None."""
    chip, _ = chosen(settings)
    return None if chip is None or chip.vendor in KNOWN_TO_VERL else chip


def device_module(chip: Chip) -> Any:
    """Return ``torch.<device>`` of ``chip``, its package imported first where torch did not do that itself.

    For the CPU that is ``CPU_MODULE``, which has what verl asks of an accelerator's.

    Raises:
        ImportError: the package is not there, or does not load.
    """
    if chip is CPU:
        return CPU_MODULE
    import torch

    if not hasattr(torch, chip.device):
        importlib.import_module(chip.package)
    return getattr(torch, chip.device)


def is_available(chip: Chip) -> bool:
    """Return whether torch can compute on ``chip`` in this process."""
    try:
        return bool(device_module(chip).is_available())
    except ImportError:
        return False


def backend(chip: Chip) -> str:
    """Return the name of the vendor's own collectives.

    Raises:
        OverlayError: none are known; FlagCX serves the chip.
    """
    if not chip.backend:
        raise OverlayError(f"no collectives are known for {chip.vendor} but FlagCX: export USE_FLAGCX=1")
    return chip.backend
