"""What is wrong with values that only this machine can judge: names of operators, hooks and chips; files and folders.

Training judges the same when it starts, with torch and FlagGems imported. Here their files are read, so some of it
cannot be told: which operators FlagGems has for this chip and this torch, and which chip a profile was made on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError, nearest
from verl_fl_overlay.flaggems import library, names, profile
from verl_fl_overlay.overlay import unknown_hooks
from verl_fl_overlay.packages import installed, version
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.loading import LOADED_BY, modules
from verl_fl_overlay.settings.stack import VENDOR_NAMES
from verl_fl_overlay.settings.variables import KEYWORDS

LISTS = ("VERL_FL_OPS", "TRAINING_FL_FLAGOS_WHITELIST", "TRAINING_FL_FLAGOS_BLACKLIST", "VERL_FL_UNSAFE_OPS")
WRITTEN = ("VERL_FL_REPORT_DIR", "TRAINING_FLAGGEMS_PATH", "FLAGGEMS_CACHE_DIR")
"""The variables with a folder or a file that processes write; they make the folders that are missing."""


def judged(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the values with which training would not start, and those that it would only warn about, with reasons."""
    errors: list[str] = []
    warnings: list[str] = []
    refused = errors if settings.flaggems_in_training else warnings  # without FlagGems nobody reads its lists
    errors += [*_hooks(settings), *_modules(settings)]
    refused += [*_operators(settings), *_profile(settings)]
    warnings += [*_unchecked(settings), *_excluded_in_vain(settings), *_chips(settings), *_not_writable(settings)]
    return errors, warnings


def _listed(settings: Settings) -> list[str]:
    return [name for name in LISTS if settings[name] and settings[name][0] not in KEYWORDS]


def _operators(settings: Settings) -> Iterator[str]:
    gems = library.in_source()
    if gems is None:
        return
    checks: dict[str, Callable[..., Any]] = {
        "VERL_FL_OPS": names.check,
        "TRAINING_FL_FLAGOS_WHITELIST": names.check,
        "VERL_FL_UNSAFE_OPS": names.check_keys,
    }
    for name in _listed(settings):
        if name in checks:
            yield from _refusal(checks[name], settings[name], name, gems)


def _refusal(function: Callable[..., Any], *arguments: Any) -> Iterator[str]:
    """Yield the text with which ``function`` refuses, in one line; nothing if it does not."""
    try:
        function(*arguments)
    except OverlayError as error:
        yield "; ".join(line.strip().rstrip(".:") for line in str(error).splitlines())


def _unchecked(settings: Settings) -> Iterator[str]:
    listed = _listed(settings)
    if listed and library.in_source() is None:
        why = "is not installed here" if not installed("flag_gems") else "has no table of operators that can be read"
        yield f"{', '.join(listed)}: FlagGems {why}, so the names cannot be checked"


def _excluded_in_vain(settings: Settings) -> Iterator[str]:
    if settings.flagos_blacklist and (gems := library.in_source()):
        for text in names.unknown_in(settings.flagos_blacklist, gems):
            yield f"TRAINING_FL_FLAGOS_BLACKLIST excludes nothing by {text}"


def _profile(settings: Settings) -> Iterator[str]:
    if settings.profile in ("", profile.AUTO):
        return
    file = Path(settings.profile)
    yield from (f"VERL_FL_PROFILE: {text}" for text in _refusal(profile.load, file))
    try:
        key = profile.load(file).key
    except OverlayError:
        return
    for package, made_with in (("torch", key.torch), ("triton", key.triton), ("flag-gems", key.flag_gems)):
        here = version(package).partition("+")[0]
        if here and here != made_with.partition("+")[0]:
            yield (
                f"VERL_FL_PROFILE={file} was measured with {package} {made_with}, and {here} is here; measure again: "
                f"verl-fl tune MODEL --out FILE"
            )


def _hooks(settings: Settings) -> Iterator[str]:
    """Yield the names that are no hook of the verl that is here, or of any release if there is none."""
    verl = compat.find_verl()
    releases = [verl] if verl else [compat.InstalledVerl(release, "") for release in compat.RELEASES]
    try:
        hooks = [hook for each in releases for hook in compat.select(each).hooks]
    except OverlayError:  # doctor and training say why this verl cannot be used
        return
    for unknown in unknown_hooks(settings, hooks):
        whose = f"verl {verl.version}" if verl else "verl-fl-overlay"
        yield f"VERL_FL_DISABLE: {whose} has no hook {unknown}; without it verl-fl doctor lists all"


def _modules(settings: Settings) -> Iterator[str]:
    for name in modules(settings.given):
        if not installed(name.partition(".")[0]):
            yield f"{LOADED_BY} names {name}, which is not installed here; without it verl cannot be imported"


def _chips(settings: Settings) -> Iterator[str]:
    named = settings["VERL_PLATFORM"].strip().lower()
    if named and chips.called(named) is None:
        known = [*chips.CHIPS, *chips.KNOWN_TO_VERL.values()]
        yield (
            f"VERL_PLATFORM={named} is no chip that is known here{nearest(named, known)}; verl takes it only if a "
            "plugin of verl brings that platform"
        )
    for variable in VENDOR_NAMES:
        vendor = settings[variable].strip().lower()
        if vendor and vendor not in chips.CHIPS:
            yield f"{variable}={vendor} is no vendor that is known here{nearest(vendor, chips.CHIPS)}"


def _not_writable(settings: Settings) -> Iterator[str]:
    for name in (name for name in WRITTEN if settings.given.get(name) and settings[name]):
        place = Path(os.path.expanduser(settings[name]))
        is_file = name == "TRAINING_FLAGGEMS_PATH"
        there = next(parent for parent in (place.parent if is_file else place, *place.parents) if parent.exists())
        if not there.is_dir():
            yield f"{name}={settings[name]} cannot be written: {there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            yield f"{name}={settings[name]} cannot be written: {there} does not allow it to this user"
