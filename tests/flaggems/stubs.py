"""The real FlagGems on a machine without an accelerator: only its questions to the device are answered for it.

Its kernels cannot run there, but they register into torch's real dispatcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

CHIP = "NVIDIA H100 80GB HBM3"


@contextmanager
def device_probes() -> Iterator[None]:
    """Answer what FlagGems asks of torch.cuda and triton while it is imported, where there is no CUDA."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name=CHIP)
    answers = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: CHIP,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
    }
    from triton.runtime import driver

    with (
        mock.patch.dict(os.environ, {"GEMS_VENDOR": "nvidia"}),
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(driver, "_active", mock.MagicMock()),  # newer ones than 5.0 ask triton as well
    ):
        yield
