"""Which accelerator torch has in this process."""

from __future__ import annotations

from typing import Any


def accelerator() -> Any:
    """Return torch's module of the accelerator here, such as ``torch.cuda``; None if there is only the CPU.

    A torch that is built for an accelerator names this module even on a machine without one.
    """
    import torch

    module = torch.get_device_module()
    return module if module is not torch.cpu and module.is_available() else None


def chip_name() -> str:
    """Return torch's name of the accelerator model here; compiled kernels and measurements hold for that model."""
    module = accelerator()
    if module is None:
        return "cpu"
    name = getattr(module, "get_device_name", None)
    return str(name() if name else module.__name__)
