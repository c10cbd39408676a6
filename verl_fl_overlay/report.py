"""What the overlay did in this process, as one JSON object: for ``doctor``, and for the files in VERL_FL_REPORT_DIR."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from verl_fl_overlay import events, features
from verl_fl_overlay.devices import chips
from verl_fl_overlay.hooks import HookStatus, State
from verl_fl_overlay.phase import training
from verl_fl_overlay.settings import VARIABLES, Settings, environment, misspelt, shown

if TYPE_CHECKING:
    from verl_fl_overlay.activation import Overlay

logger = logging.getLogger("verl_fl_overlay")

INTERVAL = 1.0
"""Least time between two writings of the report file, seconds."""


def build() -> dict[str, Any]:
    """Return the report of this process; works before verl was imported, and then names that as a problem."""
    import verl_fl_overlay
    from verl_fl_overlay import activation, compat

    overlay = activation.active()
    found = compat.find_verl()
    hooks = overlay.hooks.report() if overlay else []
    return {
        "summary": summary(overlay) if overlay else "",
        "overlay": verl_fl_overlay.__version__,
        "verl": {
            "version": found.version if found else None,
            "shim": overlay.selection.shim if overlay else None,
            "supported": overlay is not None and overlay.hooks.refusal is None,
        },
        "torch": _torch_version(),
        "device": _device(),
        "process": {"host": socket.gethostname(), "pid": os.getpid(), "rank": os.environ.get("RANK")},
        "phase": {"active": training.active, "counts": dict(training.counts)},
        "hooks": [_hook(status) for status in hooks],
        "settings": _settings(overlay.settings) if overlay else {},
        "environment": {n: shown(n, t) for n, t in overlay.settings.given.items()} if overlay else {},
        "features": _features(hooks),
        "problems": problems(hooks),
    }


def summary(overlay: Overlay) -> str:
    """Return a line on this process: the overlay, verl and its shim, the chip, what is on, and the hooks."""
    import verl_fl_overlay

    settings, selection = overlay.settings, overlay.selection
    chip, told_by = chips.chosen(settings)
    device = f"{chip.device} of {chip.vendor} ({told_by})" if chip else f"not known ({told_by})"
    states = Counter(status.state.value for status in overlay.hooks.report())
    return (
        f"verl-fl-overlay {verl_fl_overlay.__version__}: verl {selection.version} ({selection.shim}), "
        f"device {'cpu' if chip is chips.CPU else device}, {environment.summary(settings)}, "
        f"hooks {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"
    )


def problems(hooks: list[HookStatus]) -> list[str]:
    """Return, in words, what is wrong in this process."""
    from verl_fl_overlay import activation

    overlay = activation.active()
    found = misspelt()
    if overlay is None:
        found.append("the overlay is not active: verl has not been imported in this process")
    else:
        found += overlay.conflicts
        if overlay.selection.warning:
            found.append(overlay.selection.warning)
        if overlay.hooks.refusal is not None:
            found.append(str(overlay.hooks.refusal))
    found += [f"hook {s.hook.name} on {s.hook.target} failed: {s.detail}" for s in hooks if s.state is State.FAILED]
    found += [f"{where} failed and is skipped: {error}" for where, error in events.failures().items()]
    return found


def _settings(settings: Settings) -> dict[str, Any]:
    return {attribute: getattr(settings, attribute) for attribute in VARIABLES}


def _hook(status: HookStatus) -> dict[str, Any]:
    hook = status.hook
    return {
        "name": hook.name,
        "target": hook.target,
        "feature": hook.feature,
        "required": hook.required,
        "state": status.state.value,
        "detail": status.detail,
        "calls": status.calls,
        "why": hook.why,
    }


def _features(hooks: list[HookStatus]) -> dict[str, dict[str, Any]]:
    from verl_fl_overlay import activation

    overlay = activation.active()
    reported: dict[str, dict[str, Any]] = {}
    for feature in features.FEATURES.values():
        reason = feature.reason_off(overlay.settings) if overlay else "the overlay is not active"
        states = {status.state for status in hooks if status.hook.feature == (feature.fed_by or feature.name)}
        if not reason and states == {State.DISABLED}:
            reason = "every hook that it acts on is left out"
        reported[feature.name] = {"on": not reason, "reason": reason, "summary": feature.summary}
        if feature.describe and not reason:
            reported[feature.name]["detail"] = feature.describe()
    return reported


def _torch_version() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return str(torch.__version__)
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    """Say what torch computes on, without starting it: only a torch that is loaded is asked."""
    from verl_fl_overlay import activation

    overlay = activation.active()
    if overlay is not None and overlay.settings.device == "cpu":
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is None:
        return "not known: torch is not loaded"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x cuda"
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and accelerator.is_available():
        return str(accelerator.current_accelerator())
    return "cpu"


class Writer:
    """Writes the report to ``folder`` when the training phase ends, at most once a second, and at exit."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._last = float("-inf")
        self._broken = False

    def phase_left(self) -> None:
        """Write, unless the last writing was less than ``INTERVAL`` ago."""
        if time.monotonic() - self._last >= INTERVAL:
            self.write()

    def write(self) -> None:
        """Write the file whole, or not at all; a folder that cannot be written is warned about once."""
        if self._broken:
            return
        self._last = time.monotonic()
        # The process is asked each time: a forked child reports for itself.
        target = os.path.join(self._folder, f"{socket.gethostname()}-{os.getpid()}.json")
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(f"{target}.tmp", "w", encoding="utf-8") as file:
                json.dump(build(), file, indent=1)
            os.replace(f"{target}.tmp", target)
        except OSError as error:
            self._broken = True
            logger.warning("VERL_FL_REPORT_DIR=%s cannot be written (%s); training goes on", self._folder, error)


_stop: Callable[[], None] | None = None


def write_regularly(folder: str) -> None:
    """Write this process's report file into ``folder`` from now on; nothing is done for an empty name."""
    global _stop
    if not folder:
        return
    writer = Writer(folder)
    unsubscribe = training.left.subscribe(writer.phase_left)
    atexit.register(writer.write)

    def stop() -> None:
        unsubscribe()
        atexit.unregister(writer.write)

    _stop = stop


def stop_writing() -> None:
    """End what ``write_regularly`` began."""
    global _stop
    if _stop is not None:
        _stop()
        _stop = None
