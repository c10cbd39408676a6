"""Releases of verl, and of other pinned packages, as source: from VERL_WHEELS, a folder of wheels, or as installed."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest

from verl_fl_overlay.compat.pins import VERL, Package
from verl_fl_overlay.compat.release import pinning, sources
from verl_fl_overlay.compat.release.sources import Tree


@functools.cache
def find(release: str, package: Package = VERL) -> Tree | None:
    """Return the source of ``release``; None if neither a wheel nor the installed package has it."""
    wheels = f"{package.distribution.replace('-', '_')}-{release}-*.whl"
    for wheel in Path(os.environ.get("VERL_WHEELS", "/nowhere")).glob(wheels):
        kept = Path(tempfile.mkdtemp(prefix=f"{package.name}-{release}-"))
        atexit.register(shutil.rmtree, kept, ignore_errors=True)
        with zipfile.ZipFile(wheel) as zipped:
            zipped.extractall(kept, [name for name in zipped.namelist() if name.startswith(f"{package.name}/")])
        return Tree(kept, wheel.name, package=package)
    installed = sources.installed(package)
    return installed if installed is not None and installed.version == release else None


@pytest.fixture(autouse=True)
def from_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``check`` show its diffs against the wheels that are here; imported by the tests that run the command."""
    if "VERL_WHEELS" in os.environ:
        monkeypatch.setattr(sources.PinnedReleases, "tree", lambda self, release, package: find(release, package))


def tree(release: str, package: Package = VERL) -> Tree:
    """Return the source of ``release``, or skip the test."""
    found = find(release, package)
    if found is None:
        name = f"{package.distribution} {release}"
        pytest.skip(f"{name} is not installed, and VERL_WHEELS names no folder with its wheel")
    return found


def newest(package: Package = VERL) -> Tree:
    """Return the source of the newest release that is here, or skip the test."""
    for release in reversed(package.releases):
        if (found := find(release, package)) is not None:
            return found
    name = package.distribution
    pytest.skip(f"no pinned {name} is installed, and VERL_WHEELS names no folder with a wheel of one")


class _Recorded(Tree):
    def read(self, path: str) -> str | None:
        text = super().read(path)
        if text is not None:
            self.contents[path] = text  # a tree in a folder has no other use for it
        return text


def read_for_pins(tree: Tree) -> dict[str, str]:
    """Return path -> text of every file that is read to pin ``tree``."""
    recorded = _Recorded(tree.folder, tree.origin, {}, tree.package)
    pinning.pins_of(recorded)
    return dict(recorded.contents)
