"""Activation: from the environment to installed hooks and started features, once per process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import wrapt

from verl_fl_overlay import compat, events, features
from verl_fl_overlay.compat import chosen
from verl_fl_overlay.devices import chips
from verl_fl_overlay.devices.cpu import refuse_hidden_accelerator
from verl_fl_overlay.errors import OverlayError, SettingsError, UnsupportedVerlError
from verl_fl_overlay.hooks import call_again_on_import
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.phase import training
from verl_fl_overlay.report import build, file_of, summary
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.conflicts import Remark, conflicts
from verl_fl_overlay.settings.loading import LOADED_BY, OVERLAY, modules
from verl_fl_overlay.settings.table import misspelt

logger = logging.getLogger("verl_fl_overlay")


class _Process:
    """The state of this process: the active overlay, None before verl was imported, and its lock."""

    def __init__(self) -> None:
        self.overlay: Overlay | None = None
        self.lock = threading.Lock()


_process = _Process()


def active() -> Overlay | None:
    """Return the overlay of this process, None before verl was imported."""
    return _process.overlay


def report() -> dict[str, Any]:
    """Return the report of this process; if verl was not imported yet, the report names that as a problem."""
    return build(active())


def activate_with_verl() -> None:
    """Activate now if verl is being imported (it loads us by name), else as soon as it is."""
    if "verl" in sys.modules:
        _activate_or_say_why()
    else:
        wrapt.when_imported("verl")(_verl_imported)


def _verl_imported(module: ModuleType) -> None:
    try:
        _activate_or_say_why()
    except Exception:
        call_again_on_import(module, _verl_imported)
        raise


def _activate_or_say_why() -> None:
    try:
        activate()
    except OverlayError as error:
        if OVERLAY not in modules(os.environ):
            # Nobody asked for us by name: verl >= 0.9 found our entry point, and hides the errors that it raises.
            logger.warning("verl-fl-overlay is installed and stays off: %s", error)
        raise


def activate() -> Overlay:
    """Read the settings, choose the shim, install the hooks; a second call returns the first one's overlay.

    Raises:
        SettingsError: environment variables that are not allowed, or an unknown name in VERL_FL_DISABLE.
        UnsupportedVerlError: verl is missing or too old.
        HookError: a required hook does not fit the verl that is here; nothing is left installed.
    """
    with _process.lock:
        if _process.overlay is None:
            _process.overlay = overlay = _started()
            _log_at_verls_level()
            logger.info(summary(overlay))
        return _process.overlay


def _started() -> Overlay:
    settings = Settings.from_environment()
    found = compat.find_verl()
    if found is None:
        raise UnsupportedVerlError(
            f"no verl is installed here; verl-fl-overlay needs verl >= {compat.OLDEST}: verl-fl install-hint verl"
        )
    shim = compat.select(found)
    found_conflicts = [*conflicts(settings), *_too_late(settings)]
    errors = [conflict for conflict in found_conflicts if not isinstance(conflict, Remark)]
    if errors and settings.strict:
        raise SettingsError(
            "VERL_FL_STRICT=1, and these settings do not do what they say:\n"
            + "\n".join(f"  {conflict}" for conflict in errors)
        )
    for warning in [*misspelt(), *found_conflicts, *shim.warnings()]:
        logger.warning(warning)
    if settings.device == "cpu":
        refuse_hidden_accelerator()
    overlay = Overlay(settings, shim, found_conflicts)
    overlay.start()
    if settings.report_dir:
        _report_from_now_on(overlay)
    return overlay


def _report_from_now_on(overlay: Overlay) -> None:
    """Write the report now, while training goes on and at exit; Ray kills a process that has nothing more to do."""
    overlay.report_file = file = file_of(overlay)
    overlay.undo.callback(training.left.subscribe(file.write_regularly))
    atexit.register(file.write)
    overlay.undo.callback(atexit.unregister, file.write)
    try:
        file.write()
    except Exception as error:  # whatever a feature raises that describes itself
        events.failures.record("the report of this process", error)


def _log_at_verls_level() -> None:
    """Log from level VERL_LOGGING_LEVEL on, as verl's own modules do; from INFO on if it is not set."""
    level = logging.getLevelName(os.environ.get("VERL_LOGGING_LEVEL", "INFO").strip().upper())
    if isinstance(level, int):
        logger.setLevel(level)


def deactivate() -> None:
    """Take everything back; the next activation reads the environment again."""
    with _process.lock:
        overlay, _process.overlay = _process.overlay, None
        if overlay is not None:
            overlay.stop()


def _too_late(settings: Settings) -> Iterator[str]:
    """Yield what verl chose before the overlay was loaded; this cannot happen if verl loads the overlay first."""
    listed = modules(settings.given)
    if listed[:1] == (OVERLAY,):
        return
    late = []
    chip = chips.without_platform(settings)
    if chip is not None and chosen.device():
        asked = "VERL_FL_DEVICE=cpu" if chip is chips.CPU else f"the overlay's platform for {chip.vendor}"
        late.append(f"{asked} comes too late: verl had chosen its device")
    if not features.reason_off("flagcx", settings) and chosen.collectives():
        late.append("USE_FLAGCX=1 comes too late: verl had taken the name of its collectives")
    first = f"List the overlay first: {LOADED_BY}={','.join([OVERLAY, *(m for m in listed if m != OVERLAY)])}"
    yield from (f"{text} before verl-fl-overlay was loaded. {first}" for text in late)
