"""The chips of the FlagOS stack as one table: what each is called by whom, and how to tell which one is here."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings


@dataclass(frozen=True)
class Chip:
    """One vendor's chip.

    ``vendor`` is FlagGems' name, ``device`` torch's, ``backend`` the vendor's own collectives in torch ("" where none
    is known).  ``package`` is what brings ``torch.<device>`` ("" where torch itself does), ``command`` the vendor's
    tool that lists the chips, ``ray_resource`` what Ray calls them.
    """

    vendor: str
    device: str
    backend: str
    visible_devices: str
    package: str
    command: str
    ray_resource: str = "GPU"


CHIPS = {
    chip.vendor: chip
    for chip in (
        Chip("ascend", "npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES", "torch_npu", "npu-smi", "NPU"),
        Chip("mthreads", "musa", "mccl", "MUSA_VISIBLE_DEVICES", "torch_musa", "mthreads-gmi"),
        Chip("cambricon", "mlu", "cncl", "MLU_VISIBLE_DEVICES", "torch_mlu", "cnmon", "MLU"),
        Chip("enflame", "gcu", "eccl", "TOPS_VISIBLE_DEVICES", "torch_gcu", "efsmi", "GCU"),
        Chip("tsingmicro", "txda", "", "TXDA_VISIBLE_DEVICES", "torch_txda", "tsm_smi", "TXDA"),
        Chip("sunrise", "ptpu", "pccl", "PTPU_VISIBLE_DEVICES", "torch_ptpu", "pt_smi", "PTPU"),
        Chip("metax", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", "mx-smi"),
        Chip("iluvatar", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", "ixsmi"),
        Chip("hygon", "cuda", "nccl", "HIP_VISIBLE_DEVICES", "", "hy-smi"),
        Chip("kunlunxin", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", "xpu-smi"),
        Chip("amd", "cuda", "nccl", "HIP_VISIBLE_DEVICES", "", "rocm-smi"),
        Chip("nvidia", "cuda", "nccl", "CUDA_VISIBLE_DEVICES", "", "nvidia-smi"),
    )
}
"""FlagGems' name of the vendor -> its chip.  Those whose package or tool nobody else has come first."""


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def find(
    environment: Mapping[str, str] | None = None,
    *,
    installed: Callable[[str], bool] = _installed,
    command: Callable[[str], str | None] = shutil.which,
) -> tuple[Chip | None, str]:
    """Return the chip of this machine and what told it; (None, ...) where nothing does.

    No vendor's package is imported: what counts is GEMS_VENDOR, then an installed package, then a vendor's tool.
    """
    environment = os.environ if environment is None else environment
    named = environment.get("GEMS_VENDOR", "").strip().lower()
    if named in CHIPS:
        return CHIPS[named], f"GEMS_VENDOR={named}"
    for chip in CHIPS.values():
        if chip.package and installed(chip.package):
            return chip, f"{chip.package} is installed"
    for chip in CHIPS.values():
        if command(chip.command):
            return chip, f"{chip.command} is there"
    return None, "no vendor's package or tool is there"


def without_platform() -> Chip | None:
    """Return this machine's chip if torch reaches it through a device that verl itself has no platform for."""
    chip, _ = find()
    return chip if chip is not None and chip.device not in ("cuda", "npu") else None


def device_module(chip: Chip) -> Any:
    """Return ``torch.<device>`` of ``chip``, its package imported first where torch did not do that itself.

    Raises:
        ImportError: the package is not there, or does not load.
    """
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


def reason_off(settings: Settings) -> str:
    """Return why verl's own platforms do, "" where this machine's chip needs one from here."""
    if settings.device == "cpu":
        return "VERL_FL_DEVICE is cpu"
    chip, told_by = find()
    if chip is None:
        return told_by
    return f"verl has a platform for {chip.device} ({told_by})" if without_platform() is None else ""


def describe() -> dict[str, str]:
    """Return the chip's row, and what told it."""
    chip, told_by = find()
    return {"told by": told_by, **({} if chip is None else asdict(chip))}
