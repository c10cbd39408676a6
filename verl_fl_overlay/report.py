"""What the overlay did in this process, as one JSON object: for ``doctor``, and for the files in VERL_FL_REPORT_DIR."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat, events, features
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.files import RegularFile, this_process
from verl_fl_overlay.hooks import HookStatus, State
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.packages import version
from verl_fl_overlay.phase import training
from verl_fl_overlay.settings import VARIABLES
from verl_fl_overlay.settings.conflicts import Remark
from verl_fl_overlay.settings.table import misspelt, shown


def build(overlay: Overlay | None) -> dict[str, Any]:
    """Return the report of this process; ``overlay`` is its overlay, None before verl was imported."""
    hooks = overlay.hooks.report() if overlay else []
    return {
        "summary": summary(overlay) if overlay else "",
        "overlay": _version(),
        "verl": _verl(overlay),
        "torch": _torch_version(),
        "device": _device(overlay),
        "process": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "rank": os.environ.get("RANK"),
            "program": "/".join(Path(sys.argv[0]).parts[-2:]) if sys.argv else "",
        },
        "phase": {"active": training.active, "counts": dict(training.counts)},
        "hooks": [_hook(status) for status in hooks],
        "settings": {name: getattr(overlay.settings, name) for name in VARIABLES} if overlay else {},
        "environment": {n: shown(n, t) for n, t in overlay.settings.given.items()} if overlay else {},
        "features": _features(overlay, hooks),
        "problems": problems(overlay, hooks),
        "notes": [text for text in overlay.conflicts if isinstance(text, Remark)] if overlay else [],
    }


def file_of(overlay: Overlay) -> RegularFile:
    """Return the report of this process as a file in the folder of VERL_FL_REPORT_DIR."""
    folder = overlay.settings.report_dir
    return RegularFile(
        f"VERL_FL_REPORT_DIR={folder}",
        lambda: Path(folder) / f"{this_process()}.json",
        lambda: json.dumps(build(overlay), indent=1),
    )


def summary(overlay: Overlay) -> str:
    """Return a line on this process: the overlay, verl and its shim, the chip, what is on and off, and the hooks."""
    settings, shim, rank = overlay.settings, overlay.shim, os.environ.get("RANK")
    chip, told_by = chips.chosen(settings)
    device = f"{chip.device} of {chip.vendor} ({told_by})" if chip else f"not known ({told_by})"
    hooks = overlay.hooks.report()
    reasons = {name: _reason_off(overlay, hooks, name) for name in features.FEATURES}
    off = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    states = Counter(status.state.value for status in hooks)
    return (
        f"verl-fl-overlay {_version()}: {f'rank {rank}, ' if rank else ''}verl {shim.version} ({shim.name}), "
        f"device {'cpu' if chip is chips.CPU else device}; "
        f"on: {', '.join(name for name, reason in reasons.items() if not reason) or 'nothing'}; "
        f"off: {', '.join(off) or 'nothing'}; "
        f"hooks: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"
    )


def problems(overlay: Overlay | None, hooks: list[HookStatus]) -> list[str]:
    """Return, in words, what is wrong in this process."""
    found = misspelt()
    if overlay is None:
        found.append("the overlay is not active: verl has not been imported in this process")
    else:
        found += [text for text in overlay.conflicts if not isinstance(text, Remark)]
        found += overlay.shim.warnings()
        found += [overlay.report_file.fault] if overlay.report_file and overlay.report_file.fault else []
        if overlay.hooks.refusal is not None:
            found.append(str(overlay.hooks.refusal))
    found += [f"hook {s.hook.name} on {s.hook.target} failed: {s.detail}" for s in hooks if s.state is State.FAILED]
    found += [f"{where} failed and is skipped: {error}" for where, error in events.failures.told().items()]
    return found


def _version() -> str:
    return str(sys.modules["verl_fl_overlay"].__version__)


def _verl(overlay: Overlay | None) -> dict[str, Any]:
    """Return which verl is here and whether the overlay has hooks for it, also where something else keeps it off."""
    found = compat.find_verl()
    shim = overlay.shim if overlay else None
    if overlay is None and found is not None:
        with contextlib.suppress(OverlayError):
            shim = compat.select(found)
    return {
        "version": found.version if found else None,
        "shim": shim.name if shim else None,
        "supported": shim is not None and (overlay is None or overlay.hooks.refusal is None),
    }


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


def _reason_off(overlay: Overlay | None, hooks: list[HookStatus], name: str) -> str:
    """Return why a feature is off in this process, "" if it is on."""
    if overlay is None:
        return "the overlay is not active"
    entry = features.FEATURES[name]
    states = {status.state for status in hooks if status.hook.feature == (entry.fed_by or name)}
    left_out = "every hook that it acts on is left out" if states == {State.DISABLED} else ""
    return overlay.features.off.get(name, left_out)


def _features(overlay: Overlay | None, hooks: list[HookStatus]) -> dict[str, dict[str, Any]]:
    reported: dict[str, dict[str, Any]] = {}
    for name, entry in features.FEATURES.items():
        reason = _reason_off(overlay, hooks, name)
        reported[name] = {"on": not reason, "reason": reason, "summary": entry.summary}
        detail = overlay.features.describe(name) if overlay and not reason else {}
        if detail:
            reported[name]["detail"] = detail
    return reported


def _torch_version() -> str | None:
    torch = sys.modules.get("torch")
    return version("torch") or None if torch is None else str(torch.__version__)


def _device(overlay: Overlay | None) -> str:
    """Return the device that torch computes on.

    Torch is neither loaded nor started for this: a report is also written before a worker has chosen its device, and a
    process that has asked CUDA for its devices cannot fork workers that use it.
    """
    if overlay is not None and overlay.settings.device == "cpu":
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is None:
        return "not known: torch is not loaded"
    chip, _ = chips.chosen(overlay.settings) if overlay else chips.find()
    module = getattr(torch, chip.device, None) if chip else None
    if chip is None or module is None or not getattr(module, "is_initialized", lambda: False)():
        return "not known: torch has not started an accelerator"
    return f"{module.device_count()} x {chip.device}"
