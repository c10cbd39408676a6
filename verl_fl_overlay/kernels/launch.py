"""Launches a Triton kernel on the device that its tensors are on."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch ``kernel`` on the device of its first argument, which is a tensor.

    Triton launches on the current device.  To make a device current costs a quarter of a launch, and launches limit the
    speed of small models, so this is only done for a tensor on another device.
    """
    device = arguments[0].device
    accelerator = getattr(torch, device.type)
    if accelerator.current_device() == device.index:
        kernel[grid](*arguments, **constants)
        return
    with accelerator.device(device):
        kernel[grid](*arguments, **constants)
