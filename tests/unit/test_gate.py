from __future__ import annotations

import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.compat import InstalledVerl, select
from verl_fl_overlay.errors import OverlayError, UnsupportedVerlError


@pytest.mark.parametrize(
    ("version", "shim"),
    [("0.7.0", "v0_7"), ("0.7.1", "v0_7"), ("0.8.0", "v0_8"), ("0.9.0", "v0_9"), ("0.9.1", "v0_9")],
)
def test_releases(version, shim):
    chosen = select(InstalledVerl(version, ""))
    assert (chosen.name, chosen.warning) == (shim, "")


def tree(tmp_path, *files):
    for file in ["workers/engine/base.py", *files]:
        path = tmp_path / "verl" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(tmp_path / "verl")


PLATFORM, LEGACY = "plugin/platform/platform_manager.py", "workers/fsdp_workers.py"


@pytest.mark.parametrize(
    ("version", "files", "shim"),
    [
        ("0.7.0.dev", [LEGACY], "v0_7"),
        ("0.8.0.dev", [LEGACY], "v0_7"),  # before the legacy workers went
        ("0.8.0.dev", [], "v0_8"),
        ("0.9.0.dev", [], "v0_8"),  # before the platform layer came
        ("0.9.0.dev", [PLATFORM], "v0_9"),
        ("0.10.0.dev", [PLATFORM], "v0_9"),
        ("0.10.0.dev", [], "v0_9"),  # what tells the lines apart may have moved since
    ],
)
def test_development_versions_are_settled_by_the_tree(tmp_path, version, files, shim):
    chosen = select(InstalledVerl(version, tree(tmp_path, *files)))
    assert chosen.name == shim
    assert "no release" in chosen.warning or "newer" in chosen.warning


def test_development_version_without_a_tree_goes_by_its_numbers():
    assert select(InstalledVerl("0.7.0.dev", "")).name == "v0_7"


def test_newer_than_known_takes_the_newest_shim_and_says_so():
    chosen = select(InstalledVerl("0.12.3", ""))
    assert chosen.name == "v0_9"
    assert "newer than any release" in chosen.warning
    assert "parameters" in chosen.warning


@pytest.mark.parametrize("version", ["0.9.1", "0.12.3"])
def test_hooks_whose_module_is_not_there_are_told_apart(tmp_path, version):
    """One that serves an engine's package alone is left out; what the files do not show is not said."""
    assert not select(InstalledVerl(version, tree(tmp_path))).absent, "no version file: not a whole verl"
    chosen = select(InstalledVerl(version, tree(tmp_path, "version/version", "workers/engine/veomni/__init__.py")))
    assert "engine.new" not in chosen.absent
    assert chosen.absent["engine.initialize.fsdp"] == (
        f"verl {version} has no module verl.workers.engine.fsdp.transformer_impl"
    )
    assert chosen.left_out["engine.initialize.veomni"] == (
        f"verl {version} has no module verl.workers.engine.veomni.transformer_impl; an engine of veomni goes without it"
    )
    assert not set(chosen.absent) & set(chosen.left_out)


@pytest.mark.parametrize("version", ["0.6.1", "0.1", "0.6.9.dev1"])
def test_too_old(version):
    with pytest.raises(UnsupportedVerlError, match=rf"verl {version} is here.*needs verl >= 0.7.0.*install-hint verl"):
        select(InstalledVerl(version, ""))


def test_unreadable_version():
    with pytest.raises(UnsupportedVerlError, match="'banana'"):
        select(InstalledVerl("banana", ""))


@pytest.mark.parametrize(
    "file", ["workers/engine/base.py", "workers/engine/base/__init__.py", "workers/engine/base.pyc"]
)
def test_a_module_is_there_in_whatever_form_python_imports_it(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    verl = InstalledVerl("0.9.1", str(tmp_path))
    assert verl.has_module("verl.workers.engine.base")
    assert not verl.has_module("verl.workers.engine.other")


def test_without_pins_nothing_is_hooked(monkeypatch):
    monkeypatch.setattr(compat, "RELEASES", ())
    with pytest.raises(OverlayError, match="holds the pins of no release"):
        select(InstalledVerl("0.9.1", ""))
