"""How long a call or a step takes on the device that torch has here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from verl_fl_overlay.devices.accelerator import accelerator

BACK_TO_BACK = 5
"""Number of calls that are timed together."""


def call_ms(run: Callable[[], Any], repeats: int = 7) -> float:
    """Return the median time of ``run``, milliseconds, after two runs that are not counted.

    Calls are made back to back, as a step makes them, so that the host starts the next one while the device computes:
    a call takes as long as the slower of the two needs.
    """
    device = accelerator()
    times = []
    for _ in range(repeats + 2):
        if device:
            start, end = (device.Event(enable_timing=True) for _ in range(2))
            start.record()
        begun = time.perf_counter()
        for _ in range(BACK_TO_BACK):
            run()
        took = 1000 * (time.perf_counter() - begun)
        if device:
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        times.append(took / BACK_TO_BACK)
    return statistics.median(times[2:])


def step_ms(step: Callable[[], None], repeats: int = 3) -> float:
    """Return the median time of a step, milliseconds, after one step that is not counted."""
    device = accelerator()
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        step()
        if device:
            device.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[1:])
