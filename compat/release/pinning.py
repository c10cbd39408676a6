"""Makes the pins of a release: the fingerprints of everything in verl that its hooks and the trial step use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.compat import trial
from verl_fl_overlay.compat.pins import HOOKS, MISSING, TRIAL
from verl_fl_overlay.compat.release.fingerprint import fingerprint
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.hooks import Hook


@dataclass(frozen=True)
class _InTree(compat.InstalledVerl):
    """A verl that is read from its files; it need not be installed."""

    tree: Tree

    def has(self, path: str) -> bool:
        return self.tree.has(f"verl/{path}")


def verl_in(tree: Tree) -> compat.InstalledVerl:
    """Return the verl in ``tree`` as the gate takes it."""
    return _InTree(tree.version, "", tree)


def shim_for(tree: Tree) -> compat.Shim:
    """Choose the same hooks as the overlay would choose for the verl in ``tree``.

    Raises:
        UnsupportedVerlError: it is too old.
    """
    return compat.select(verl_in(tree))


def targets(hooks: tuple[Hook, ...]) -> list[str]:
    """Return ``module:attribute`` of all that the hooks are put on or rely on inside verl, sorted."""
    return sorted({t for hook in hooks for t in (hook.target, *hook.relies_on) if t.startswith("verl.")})


def pins_of(tree: Tree) -> dict[str, Any]:
    """Fingerprint everything that the hooks of this verl, and the trial, use.

    Raises:
        OverlayError: the verl is too old, or a file in which something is pinned cannot be parsed.
    """
    shim = shim_for(tree)
    parts = {HOOKS: targets(shim.hooks), TRIAL: trial.RELIES_ON}
    prints = {part: {t: fingerprint(tree, *t.split(":")).to_json() for t in used} for part, used in parts.items()}
    return {"verl": tree.version, "shim": shim.name, **prints}


def missing(pins: dict[str, Any]) -> list[str]:
    """Return the targets that verl lacks.  Pins with them must not be written: they would accept the absence."""
    return [target for part in (HOOKS, TRIAL) for target, pin in pins[part].items() if pin["kind"] == MISSING.kind]


def as_text(pins: dict[str, Any]) -> str:
    """Return the pins as the text of their file; equal pins give equal text."""
    return json.dumps(pins, indent=1, sort_keys=True) + "\n"
