"""What is installed, told without importing it."""

from __future__ import annotations

import sys
import types

import pytest

from verl_fl_overlay import packages, versions


@pytest.mark.parametrize(
    ("made", "there"), [(["other"], False), (["core"], True), ([], False)], ids=["another_part", "it", "nothing"]
)
def test_a_part_of_a_namespace_is_not_the_whole(tmp_path, monkeypatch, request, made, there):
    """megatron.energon is a package of its own: where it is, megatron.core need not be."""
    space = f"space_of_{request.node.callspec.id}"
    for part in made:
        folder = tmp_path / space / part
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.installed(f"{space}.core") is there


def test_what_lies_in_a_package_that_cannot_be_imported_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "broken_space" / "core").mkdir(parents=True)
    (tmp_path / "broken_space" / "__init__.py").write_text("raise ImportError('libcudart.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not packages.installed("broken_space.core")


def test_a_module_made_by_hand_is_there_and_has_no_folders(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_by_hand", types.ModuleType("made_by_hand"))
    assert packages.installed("made_by_hand")
    assert packages.has_code("made_by_hand")
    assert packages.folders("made_by_hand") == []


def test_a_clone_beside_the_program_is_no_code(tmp_path, monkeypatch):
    (tmp_path / "cloned" / "cloned").mkdir(parents=True)
    (tmp_path / "cloned" / "cloned" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not packages.has_code("cloned")
    assert not packages.has_code("not_there")
    monkeypatch.syspath_prepend(tmp_path / "cloned")
    assert packages.has_code("cloned")


@pytest.mark.parametrize("metadata", [None, "", "Name: half\n"])
def test_metadata_that_an_installer_left_half_written_tell_no_version(metadata, tmp_path, monkeypatch):
    info = tmp_path / "half-1.0.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.version("half") == ""
    assert versions._metadata("half") == ("", [])
    assert list(versions.unmet(["half"], {})) == []
