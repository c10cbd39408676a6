"""FlagCX's library by the rules of the system's loader, with small libraries that the compiler makes here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import output

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the loader is Linux's"),
]

PROGRAM = """
    import os, sys
    from types import SimpleNamespace
    sys.path.insert(0, os.environ["PLUGIN"])
    torch = SimpleNamespace(Backend=SimpleNamespace(backend_capability={"flagcx": ["cuda"]}))
    sys.modules["torch"] = sys.modules["torch.distributed"] = torch
    from verl_fl_overlay.features import flagcx
    try:
        found = flagcx.load()
        print(found.plugin, sys.modules["flagcx"].version(), found.library, bool(found.conflict))
    except Exception as error:
        print(type(error).__name__, error)
"""


def library(folder: Path, number: int) -> Path:
    """Make a library that has no SONAME, as FlagCX's own build does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "libflagcx.so"
    compiled(f"int number(void) {{ return {number}; }}", file)
    return file


def compiled(code: str, file: Path, *options: str) -> None:
    source = file.with_suffix(".c")
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", file, *options], check=True, timeout=60)


@pytest.fixture
def plugin(tmp_path) -> Path:
    """Return a plugin, in a folder for Python's path, whose library lies where it was built, and is gone there."""
    built = library(tmp_path / "elsewhere", 1)
    package = tmp_path / "site-packages/flagcx"
    package.mkdir(parents=True)
    compiled(
        "int number(void); int version(void) { return number(); }",
        package / "_C.so",
        f"-L{built.parent}",
        "-lflagcx",
        "-Wl,-rpath,$ORIGIN",
    )
    built.unlink()
    load = "import ctypes, os; version = ctypes.CDLL(os.path.join(os.path.dirname(__file__), '_C.so')).version"
    (package / "__init__.py").write_text(load)
    return package


def loaded(plugin: Path, folder: Path) -> str:
    return output(PROGRAM, env={"PLUGIN": str(plugin.parent), "FLAGCX_PATH": str(folder)})


def test_a_plugin_that_was_built_elsewhere_finds_the_paths_library(plugin, tmp_path):
    here = library(tmp_path / "here/build/lib", 2)
    assert loaded(plugin, tmp_path / "here") == f"{plugin}/__init__.py 2 {here} False"


def test_a_plugin_that_has_a_library_of_its_own_keeps_it(plugin, tmp_path):
    library(tmp_path / "here/build/lib", 2)
    beside = library(plugin, 3)
    assert loaded(plugin, tmp_path / "here") == f"{plugin}/__init__.py 3 {beside} True"


def test_a_library_that_lacks_what_the_plugin_calls_is_told_with_the_way_on(plugin, tmp_path):
    compiled("", library(tmp_path / "here/build/lib", 2))
    told = loaded(plugin, tmp_path / "here")
    assert told.startswith("FlagCXError FlagCX's torch plugin cannot be imported: ")
    assert "undefined symbol: number" in told
    assert f". LD_LIBRARY_PATH={tmp_path}/here/build/lib:$LD_LIBRARY_PATH may help, or build it for this" in told
