"""The installed distribution: what lies where, and what it asks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
from packaging.requirements import Requirement

from verl_fl_overlay import __version__, compat

DISTRIBUTION = importlib.metadata.distribution("verl-fl-overlay")


def test_compat_is_inside_the_package_only():
    files = {str(file) for file in DISTRIBUTION.files or ()}
    if DISTRIBUTION.read_text("RECORD") is None or "verl_fl_overlay/__init__.py" not in files:
        pytest.skip("installed with -e: there is no list of installed files")
    assert "verl_fl_overlay/compat/__init__.py" in files
    assert "verl_fl_overlay/py.typed" in files
    assert {f"verl_fl_overlay/compat/pins/{release}.json" for release in compat.RELEASES} <= files
    assert not {file for file in files if file.startswith(("compat/", "tests/"))}


def test_only_two_hard_dependencies():
    needs = [Requirement(text) for text in DISTRIBUTION.requires or ()]
    assert {need.name for need in needs if need.marker is None} == {"wrapt", "packaging"}


def test_entry_points():
    points = {(point.group, point.name, point.value) for point in DISTRIBUTION.entry_points}
    assert ("console_scripts", "verl-fl", "verl_fl_overlay.cli:main") in points
    assert ("verl.plugins", "verl_fl_overlay", "verl_fl_overlay") in points
    assert DISTRIBUTION.version == __version__
