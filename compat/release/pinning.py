"""Makes the pins of a release: the fingerprints of everything in it that hooks and the trial step use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.compat import trial
from verl_fl_overlay.compat.pins import HOOKS, MISSING, TRIAL, VERL, Package, top_level
from verl_fl_overlay.compat.release.fingerprint import fingerprint
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.hooks import Hook


@dataclass(frozen=True)
class _InTree(compat.InstalledVerl):
    """A verl that is read from its files; it need not be installed."""

    tree: Tree

    def has(self, path: str) -> bool:
        return self.tree.has(f"verl/{path}")


def shim_for(tree: Tree) -> compat.Shim:
    """Choose the same hooks as the overlay would choose for the verl in ``tree``; for another package all that use it.

    Raises:
        UnsupportedVerlError: it is a verl that is too old.
    """
    if tree.package == VERL:
        return compat.select(_InTree(tree.version, "", tree))
    return compat.Shim(tree.version, "every verl release", hooks_that_use(tree.package))


def hooks_that_use(package: Package) -> tuple[Hook, ...]:
    """Return the hooks of every verl release that are put on ``package`` or rely on it, each of them once."""
    every = [hook for release in compat.RELEASES for hook in compat.select(compat.InstalledVerl(release, "")).hooks]
    return tuple({(h.name, *used): h for h in every if (used := targets((h,), package))}.values())


def targets(hooks: tuple[Hook, ...], package: Package = VERL) -> list[str]:
    """Return ``module:attribute`` of all that the hooks are put on or rely on inside ``package``, sorted."""
    return sorted({t for hook in hooks for t in (hook.target, *hook.relies_on) if top_level(t) == package.name})


def pins_of(tree: Tree) -> dict[str, Any]:
    """Fingerprint everything in ``tree`` that hooks, and if it is verl the trial, use.

    Raises:
        OverlayError: it is a verl that is too old, or a file in which something is pinned cannot be parsed.
    """
    shim = shim_for(tree)
    about: dict[str, Any] = {tree.package.distribution: tree.version}
    parts: dict[str, Iterable[str]] = {HOOKS: targets(shim.hooks, tree.package)}
    if tree.package == VERL:
        about["shim"], parts[TRIAL] = shim.name, trial.RELIES_ON
    prints = {part: {t: fingerprint(tree, *t.split(":")).to_json() for t in used} for part, used in parts.items()}
    return {**about, **prints}


def missing(pins: dict[str, Any]) -> list[str]:
    """Return the targets that are not there.  Pins with them must not be written: they would accept the absence."""
    found = {**pins[HOOKS], **pins.get(TRIAL, {})}
    return [target for target, pin in found.items() if pin["kind"] == MISSING.kind]


def as_text(pins: dict[str, Any]) -> str:
    """Return the pins as the text of their file; equal pins give equal text."""
    return json.dumps(pins, indent=1, sort_keys=True) + "\n"
