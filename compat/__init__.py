"""Where FlagOS is put into each verl release.  No other package names verl's internals.

This file is the gate: from the verl that is here it chooses the hooks of its release line (a shim), or refuses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import all_suffixes

from packaging.version import InvalidVersion, Version

from verl_fl_overlay.errors import OverlayError, UnsupportedVerlError
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.packages import installed

OLDEST = Version("0.7.0")


@functools.cache
def releases_in(folder: str) -> tuple[str, ...]:
    """Return the releases that have a file of pins in ``folder``, oldest first.

    Files that are not named after a release (``0.9.2.json.part``, ``0.9.2.dev0.json``) are ignored.
    """
    try:
        names = os.listdir(os.path.join(os.path.dirname(__file__), folder))
    except OSError:  # from within a zip
        from importlib.resources import files

        pins = files(__name__).joinpath(folder)
        names = [file.name for file in pins.iterdir()] if pins.is_dir() else []
    found = []
    for name in names:
        with contextlib.suppress(InvalidVersion):
            version = Version(name.removesuffix(".json"))
            if f"{version}.json" == name and not version.is_prerelease:
                found.append(version)
    return tuple(map(str, sorted(found)))


RELEASES = releases_in("pins")
"""The pinned releases of verl: the overlay was written for them and is tested with them."""


@dataclass(frozen=True)
class Shim:
    """What the gate chose: verl's version, the shim's name (v0_9), its hooks, and a warning for an untested version.

    ``left_out`` and ``absent`` are hook -> reason, for hooks on modules that this verl does not have.  ``left_out``
    holds the hooks that need a package: each serves one engine, and a refusal would stop users of other engines too.
    ``absent`` holds all others: the overlay refuses if a required one is absent, and warns if an optional one is.
    """

    version: str
    name: str
    hooks: tuple[Hook, ...]
    warning: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return what to warn about at load: an untested version, and each engine here that lost its hooks."""
        engines = [self.left_out[h.name] for h in self.hooks if h.name in self.left_out and installed(h.needs)]
        return list(dict.fromkeys(filter(None, (self.warning, *engines))))


@dataclass(frozen=True)
class InstalledVerl:
    """The verl of this process or environment: its version's text and its package folder ("" if not known)."""

    version: str
    folder: str

    def has(self, path: str) -> bool:
        """Say whether its package has a file ``path``."""
        return os.path.isfile(os.path.join(self.folder, path))

    def has_module(self, name: str) -> bool:
        """Say whether it has a module or package ``name`` (``verl.workers.engine``)."""
        path = name.removeprefix("verl.").replace(".", "/")
        return any(self.has(f"{path}{end}") or self.has(f"{path}/__init__{end}") for end in all_suffixes())


def find_verl() -> InstalledVerl | None:
    """Return the verl that is imported or would be imported, without importing it; None if there is none.

    The module is read first: it may come from a source tree, which the installed metadata does not describe.
    """
    module = sys.modules.get("verl")
    spec = importlib.util.find_spec("verl") if module is None else module.__spec__
    folder = os.path.dirname(spec.origin) if spec is not None and spec.origin else ""
    version = getattr(module, "__version__", None) or _version_file(folder)
    if version:
        return InstalledVerl(version, folder)
    try:
        distribution = importlib.metadata.distribution("verl")
    except importlib.metadata.PackageNotFoundError:
        return None
    return InstalledVerl(distribution.version, str(distribution.locate_file("verl")))


def _version_file(folder: str) -> str:
    try:
        with open(os.path.join(folder, "version", "version"), encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def finds_plugin(version: str, name: str) -> bool:
    """Return whether verl ``version`` loads the entry point ``name`` by itself; releases before 0.9 load none."""
    allowed = [part.strip() for part in os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").lower().split(",")]
    if Version(version) < Version("0.9.dev0") or (allowed != ["auto"] and name not in allowed):
        return False
    return bool(importlib.metadata.entry_points(group="verl.plugins", name=name))


def select(verl: InstalledVerl) -> Shim:
    """Choose the shim for ``verl``, and look for the modules of its hooks.

    Only the release numbers of a version count, since a git checkout of 0.7.0 says 0.7.0.dev.  A development version
    may be from before or after a change, so there the files decide.

    Raises:
        UnsupportedVerlError: verl is older than 0.7.0, or its version cannot be read.
        OverlayError: there are no pins, so that nothing could be checked.
    """
    if not RELEASES:
        raise OverlayError("verl_fl_overlay/compat/pins holds the pins of no release: reinstall verl-fl-overlay")
    try:
        version = Version(verl.version)
    except InvalidVersion as error:
        raise UnsupportedVerlError(
            f"verl says its version is {verl.version!r}, which is no Python version; needed is >= {OLDEST}. "
            "Set it in verl/version/version."
        ) from error
    base = Version(version.base_version)
    if base < OLDEST:
        raise UnsupportedVerlError(
            f"verl {verl.version} is here; verl-fl-overlay needs verl >= {OLDEST} (tested: {', '.join(RELEASES)}). "
            "Upgrade it with: verl-fl install-hint verl - or take verl_fl_overlay out of VERL_USE_EXTERNAL_MODULES."
        )
    # A version after the newest release may have moved the files that the probe looks for, so the version decides.
    name = _name_by_probe(verl) if version.is_devrelease and base <= Version(RELEASES[-1]) else None
    if name is None:
        name = _name_by_version(base)
    hooks = _hooks(name, base)
    gone = _without_module(verl, hooks)
    return Shim(
        verl.version,
        name,
        hooks,
        _warning(version, base, name),
        {
            h.name: f"{gone[h.name]}; an engine of {h.needs} goes without it"
            for h in hooks
            if h.name in gone and h.needs
        },
        {h.name: gone[h.name] for h in hooks if h.name in gone and not h.needs},
    )


def _without_module(verl: InstalledVerl, hooks: tuple[Hook, ...]) -> dict[str, str]:
    """Return hook -> reason for hooks on modules that verl does not have; empty if verl's files cannot be read."""
    if not verl.has("version/version"):  # the folder is not known, or in a zip
        return {}
    modules = {hook.module for hook in hooks if hook.module.startswith("verl.")}
    gone = {module for module in modules if not verl.has_module(module)}
    return {h.name: f"verl {verl.version} has no module {h.module}" for h in hooks if h.module in gone}


def _name_by_version(base: Version) -> str:
    if base < Version("0.8"):
        return "v0_7"
    return "v0_8" if base < Version("0.9") else "v0_9"


def _name_by_probe(verl: InstalledVerl) -> str | None:
    """Return the shim, found by files that only its release line has; None if the folder has no source of verl."""
    if not verl.has("workers/engine/base.py"):
        return None
    if verl.has("plugin/platform/platform_manager.py"):
        return "v0_9"
    return "v0_7" if verl.has("workers/fsdp_workers.py") else "v0_8"


def _hooks(name: str, base: Version) -> tuple[Hook, ...]:
    return tuple(importlib.import_module(f"{__name__}.{name}").hooks(base))


def _warning(version: Version, base: Version, name: str) -> str:
    if str(version) in RELEASES:
        return ""
    newer = base > Version(RELEASES[-1])
    return (
        f"verl {version} is {'newer than any' if newer else 'no'} release that verl-fl-overlay was tested with "
        f"({', '.join(RELEASES)}); using the hooks of {name}. Each hook's target is checked for its parameters when it "
        "is installed, and a required one that is gone or differs is refused."
    )
