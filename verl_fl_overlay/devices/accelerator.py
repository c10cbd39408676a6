"""Which accelerator torch has in this process."""

from __future__ import annotations

from typing import Any


def accelerator() -> Any:
    """Return torch's module of the accelerator here, such as ``torch.cuda``; None where there is only the CPU.

    A torch built for an accelerator names its module also on a machine without one.
    """
    import torch

    module = torch.get_device_module()
    return module if module is not torch.cpu and module.is_available() else None


def chip_name() -> str:
    """Return the model of the accelerator here, as torch names it: what was compiled or measured is for that one."""
    module = accelerator()
    if module is None:
        return "cpu"
    name = getattr(module, "get_device_name", None)
    return str(name() if name else module.__name__)
