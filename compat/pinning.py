"""Making the pins of a release: the fingerprints of everything that its shim hooks, from a wheel or a folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.compat.fingerprint import Folder, Source, Wheel, fingerprint
from verl_fl_overlay.errors import OverlayError


def open_source(path: Path) -> Source:
    """Open a wheel or a folder that holds verl.

    Raises:
        OverlayError: the path is neither.
    """
    if path.is_dir():
        source: Source = Folder(path)
    else:
        try:
            source = Wheel(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise OverlayError(f"{path} is neither a folder nor a wheel that can be read: {error}") from error
    if source.read("verl/version/version") is None:
        raise OverlayError(f"{path} does not hold verl: there is no verl/version/version in it")
    return source


def pins_of(path: Path) -> dict[str, Any]:
    """Fingerprint every hooked function of the verl in ``path``."""
    source = open_source(path)
    version = (source.read("verl/version/version") or "").strip()
    folder = str(path / "verl") if path.is_dir() else ""
    selection = compat.select(compat.InstalledVerl(version, folder))
    targets = sorted({(h.module, h.attribute) for h in selection.hooks if h.module.startswith("verl.")})
    functions = {f"{m}:{a}": fingerprint(source, m, a).to_json() for m, a in targets}
    return {"verl": version, "shim": selection.shim, "functions": functions}


def as_text(pins: dict[str, Any]) -> str:
    """Return the pins as they stand in their file, the same text for the same pins."""
    return json.dumps(pins, indent=1, sort_keys=True) + "\n"
