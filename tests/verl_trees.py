"""verl's releases as source: from VERL_WHEELS, a folder of downloaded wheels, or the verl that is installed."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.compat.release import sources
from verl_fl_overlay.compat.release.sources import Tree


@functools.cache
def find(release: str) -> Tree | None:
    """Return the source of ``release``; None if neither a wheel nor an installed verl has it."""
    for wheel in Path(os.environ.get("VERL_WHEELS", "/nowhere")).glob(f"verl-{release}-*.whl"):
        kept = Path(tempfile.mkdtemp(prefix=f"verl-{release}-"))
        atexit.register(shutil.rmtree, kept, ignore_errors=True)
        with zipfile.ZipFile(wheel) as zipped:
            zipped.extractall(kept, [name for name in zipped.namelist() if name.startswith("verl/")])
        return Tree(kept, wheel.name)
    installed = compat.find_verl()
    if installed is not None and installed.version == release:
        return Tree(Path(installed.folder).parent, "installed")
    return None


@pytest.fixture(autouse=True)
def from_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``check`` show its diffs against the wheels that are here; imported by the tests that run the command."""
    if "VERL_WHEELS" in os.environ:
        monkeypatch.setattr(sources.PinnedReleases, "tree", lambda self, release: find(release))


def tree(release: str) -> Tree:
    """Return the source of ``release``, or skip the test."""
    found = find(release)
    if found is None:
        pytest.skip(f"verl {release} is not installed, and VERL_WHEELS names no folder with its wheel")
    return found


def newest() -> Tree:
    """Return the source of the newest release that is here, or skip the test."""
    for release in reversed(compat.RELEASES):
        if (found := find(release)) is not None:
            return found
    pytest.skip("no verl release is installed, and VERL_WHEELS names no folder with wheels")
