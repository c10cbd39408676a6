"""How long a call or a step takes, on whatever device torch has here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def accelerator() -> Any:
    """Return torch's module of the accelerator here, such as ``torch.cuda``; None where there is only the CPU."""
    module = torch.get_device_module()
    return module if module is not torch.cpu and module.is_available() else None


def call_ms(run: Callable[[], Any], repeats: int = 9) -> float:
    """Return the median time of ``run``, milliseconds: the device's, or the host's if that is longer."""
    device = accelerator()
    times = []
    for _ in range(repeats + 2):
        events = [device.Event(enable_timing=True) for _ in range(2)] if device else []
        begun = time.perf_counter()
        if events:
            events[0].record()
        run()
        took = 1000 * (time.perf_counter() - begun)
        if events:
            events[1].record()
            events[1].synchronize()
            took = max(took, events[0].elapsed_time(events[1]))
        times.append(took)
    return statistics.median(times[2:])


def step_ms(step: Callable[[], None], repeats: int = 3) -> float:
    """Return the median time of a step, milliseconds, after one that is not counted."""
    device = accelerator()
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        step()
        if device:
            device.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[1:])
