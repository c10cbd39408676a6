"""Making the pins of a release: the fingerprints of everything that its shim hooks and relies on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.compat.release.fingerprint import fingerprint
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.hooks import Hook


@dataclass(frozen=True)
class _InTree(compat.InstalledVerl):
    """A verl that is only read."""

    tree: Tree

    def has(self, path: str) -> bool:
        return self.tree.has(f"verl/{path}")


def selection_for(tree: Tree) -> compat.Shim:
    """Choose the hooks as the overlay would for the verl in ``tree``.

    Raises:
        UnsupportedVerlError: it is too old.
    """
    return compat.select(_InTree(tree.version, "", tree))


def targets(hooks: tuple[Hook, ...]) -> list[str]:
    """Return ``module:attribute`` of all that the hooks are put on or rely on inside verl, sorted."""
    return sorted({t for hook in hooks for t in (hook.target, *hook.relies_on) if t.startswith("verl.")})


def pins_of(tree: Tree) -> dict[str, Any]:
    """Fingerprint everything the hooks of this verl need.

    Raises:
        OverlayError: the verl is too old, or a hooked file cannot be parsed.
    """
    selection = selection_for(tree)
    prints = {target: fingerprint(tree, *target.split(":")).to_json() for target in targets(selection.hooks)}
    return {"verl": tree.version, "shim": selection.name, "functions": prints}


def as_text(pins: dict[str, Any]) -> str:
    """Return the pins as they stand in their file, the same text for the same pins."""
    return json.dumps(pins, indent=1, sort_keys=True) + "\n"
