"""Activation: from the environment to installed hooks, once a process."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import wrapt

from verl_fl_overlay import compat, events, features, report
from verl_fl_overlay.compat import pins
from verl_fl_overlay.devices import chips
from verl_fl_overlay.devices import cpu as devices
from verl_fl_overlay.errors import OverlayError, SettingsError, UnsupportedVerlError
from verl_fl_overlay.features import flagcx
from verl_fl_overlay.hooks import Hook, HookSet, call_again_on_import
from verl_fl_overlay.packages import installed
from verl_fl_overlay.settings import Settings, environment, misspelt
from verl_fl_overlay.settings.conflicts import Remark, conflicts

logger = logging.getLogger("verl_fl_overlay")


class Overlay:
    """The active overlay of this process: what was chosen, what in the settings has no effect, and the hooks."""

    def __init__(self, settings: Settings, selection: compat.Selection, conflicts: Sequence[str] = ()) -> None:
        self.settings = settings
        self.conflicts = conflicts
        self.selection = selection
        self.hooks = HookSet(
            selection.hooks,
            disabled={**_engines_gone(selection), **_disabled(settings, selection.hooks)},
            absent=_absent(selection),
            strict=settings.strict,
            verify=pins.verify,
        )
        self._stop_features: Callable[[], None] | None = None

    def start(self) -> None:
        """Install the hooks and start the features; all of it or nothing."""
        try:
            self.hooks.install()
            self._stop_features = features.start(self.settings)
        except BaseException:
            self.hooks.remove()
            raise

    def stop(self) -> None:
        """Stop the features and remove the hooks."""
        if self._stop_features is not None:
            self._stop_features()
            self._stop_features = None
        self.hooks.remove()


_active: Overlay | None = None
_lock = threading.Lock()


def active() -> Overlay | None:
    """Return the overlay of this process, None before verl was imported."""
    return _active


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
        if "verl_fl_overlay" not in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
            # Nobody asked for us by name: verl >= 0.9 found our entry point, and hides what it raises.
            logger.warning("verl-fl-overlay is installed and stays off: %s", error)
        raise


def activate() -> Overlay:
    """Read the settings, choose the shim, install the hooks; a second call returns the first one's overlay.

    Raises:
        SettingsError: environment variables that are not allowed, or an unknown name in VERL_FL_DISABLE.
        UnsupportedVerlError: verl is missing or too old.
        HookError: a required hook does not fit the verl that is here; nothing is left installed.
    """
    global _active
    with _lock:
        if _active is not None:
            return _active
        settings = Settings.from_environment()
        found = compat.find_verl()
        if found is None:
            raise UnsupportedVerlError(
                f"no verl is installed here; verl-fl-overlay needs verl >= {compat.OLDEST}: pip install verl"
            )
        selection = compat.select(found)
        found_conflicts = [*conflicts(settings), *_too_late(settings)]
        errors = [conflict for conflict in found_conflicts if not isinstance(conflict, Remark)]
        if errors and settings.strict:
            raise SettingsError(
                "VERL_FL_STRICT=1, and these settings do not do what they say:\n"
                + "\n".join(f"  {conflict}" for conflict in errors)
            )
        untested = [selection.warning, *_engines_gone(selection).values()] if selection.warning else []
        for warning in [*misspelt(), *found_conflicts, *untested]:
            logger.warning(warning)
        if settings.device == "cpu":
            devices.refuse_hidden_accelerator()
        overlay = Overlay(settings, selection, found_conflicts)
        events.set_strict(settings.strict)
        overlay.start()
        report.write_regularly(settings.report_dir)
        _active = overlay
        _log_at_verls_level()
        logger.info(report.summary(overlay))
        return overlay


def _log_at_verls_level() -> None:
    """Log from VERL_LOGGING_LEVEL on, as verl's own modules do, and from INFO on where that is not set."""
    level = logging.getLevelName(os.environ.get("VERL_LOGGING_LEVEL", "INFO").strip().upper())
    if isinstance(level, int):
        logger.setLevel(level)


def deactivate() -> None:
    """Take everything back; the next activation reads the environment anew."""
    global _active
    with _lock:
        if _active is not None:
            _active.stop()
            report.stop_writing()
            _active = None


def _too_late(settings: Settings) -> Iterator[str]:
    """Tell what verl chose before it could be told of ours; where it loads us first that cannot be."""
    listed = settings.given.get(environment.LOADED_BY, "").split(",")
    if listed[0] == environment.OVERLAY:
        return
    from verl_fl_overlay.compat import process_group  # the shim's hooks are made by now, and have brought it

    late = []
    chip = chips.without_platform(settings)
    if chip is not None and compat.device_chosen():
        asked = "VERL_FL_DEVICE=cpu" if chip is chips.CPU else f"the overlay's platform for {chip.vendor}"
        late.append(f"{asked} comes too late: verl had chosen its device")
    if not flagcx.reason_off(settings) and process_group.backend_bound():
        late.append("USE_FLAGCX=1 comes too late: verl had taken the name of its collectives")
    others = [module for module in listed if module and module != environment.OVERLAY]
    first = f"List the overlay first: {environment.LOADED_BY}={','.join([environment.OVERLAY, *others])}"
    yield from (f"{text} before verl-fl-overlay was loaded. {first}" for text in late)


def _absent(selection: compat.Selection) -> dict[str, str]:
    return {
        hook.name: f"verl {selection.version} has no module {hook.module}"
        for hook in selection.hooks
        if hook.module in selection.absent and not hook.needs
    }


def _engines_gone(selection: compat.Selection) -> dict[str, str]:
    """Return the hooks that are one engine's, with what became of it: to refuse would hit who trains on another."""
    return {
        hook.name: f"verl {selection.version} has no module {hook.module}; an engine of {hook.needs} goes without it"
        for hook in selection.hooks
        if hook.module in selection.absent and hook.needs and installed(hook.needs)
    }


def _disabled(settings: Settings, hooks: Iterable[Hook]) -> dict[str, str]:
    known = [hook.name for hook in hooks]
    unknown = [name for name in settings.disable if name != "*" and name not in known]
    if unknown:
        lines = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=3)
            lines.append(f"  {name!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
        raise SettingsError(
            "VERL_FL_DISABLE names hooks that do not exist for this verl:\n"
            + "\n".join(lines)
            + f"\n  allowed: *, {', '.join(known)}"
        )
    reasons = {feature: features.reason_off(feature, settings) for feature in {hook.feature for hook in hooks}}
    off = {hook.name: reasons[hook.feature] for hook in hooks if reasons[hook.feature]}
    by_name = known if "*" in settings.disable else settings.disable
    with_it = {h.name: f"left out with {h.pair}, which VERL_FL_DISABLE names" for h in hooks if h.pair in by_name}
    return {**off, **with_it, **dict.fromkeys(by_name, "left out by VERL_FL_DISABLE")}
