"""The installed distribution: what lies where, and what it asks for; and the checkout that is not installed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path, PurePath

import pytest
from processes import output, run

import verl_fl_overlay
from verl_fl_overlay import __version__, compat
from verl_fl_overlay.compat.pins import PACKAGES

ROOT = Path(__file__).parents[2]
FOLDERS = {"verl_fl_overlay": ROOT / "verl_fl_overlay", "verl_fl_overlay.compat": ROOT / "compat"}
DISTRIBUTION = importlib.metadata.distribution("verl-fl-overlay")


def files_of(folder: Path, *patterns: str) -> list[Path]:
    return [file for pattern in patterns for file in folder.rglob(pattern) if "__pycache__" not in file.parts]


def installed_files() -> set[str]:
    """Return the files of the distribution that was made of this checkout, or skip the test."""
    files = {str(file) for file in DISTRIBUTION.files or ()}
    if DISTRIBUTION.read_text("RECORD") is None or "verl_fl_overlay/__init__.py" not in files:
        pytest.skip("installed with -e: there is no list of installed files")
    if Path(verl_fl_overlay.__file__) != Path(str(DISTRIBUTION.locate_file("verl_fl_overlay/__init__.py"))):
        pytest.skip("the overlay that is tested is not the one that is installed")
    return files


def test_compat_is_inside_the_package_only():
    files = installed_files()
    assert "verl_fl_overlay/compat/__init__.py" in files
    assert "verl_fl_overlay/py.typed" in files
    pinned = {f"{package.folder}/{release}.json" for package in PACKAGES.values() for release in package.releases}
    assert {f"verl_fl_overlay/compat/{file}" for file in pinned} <= files
    assert not {file for file in files if file.startswith(("compat/", "tests/", "tools/"))}


def test_what_is_installed_is_what_the_checkout_has():
    """No file that is read is left out, and none is in it that a build before this one left behind."""
    kinds = ("*.py", "*.json", "*.yaml", "py.typed")
    wanted = {
        f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in files_of(folder, *kinds)
    }
    installed = {file for file in installed_files() if file.startswith("verl_fl_overlay/")}
    assert {file for file in installed if any(map(PurePath(file).match, kinds))} == wanted


def test_entry_points():
    points = {(point.group, point.name, point.value) for point in DISTRIBUTION.entry_points}
    assert ("console_scripts", "verl-fl", "verl_fl_overlay.cli:main") in points
    assert ("verl.plugins", "verl_fl_overlay", "verl_fl_overlay") in points
    assert DISTRIBUTION.version == __version__


@pytest.fixture(params=["nothing", "a file with the link's text"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of the checkout's two folders.

    Until 0.1.0 a link to ../compat lay in the one, and where links are not known a text file takes the place of such.
    """
    for folder in FOLDERS.values():
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    if request.param != "nothing":
        (tmp_path / "verl_fl_overlay" / "compat").write_text("../compat")
    return tmp_path


def test_a_checkout_that_is_not_installed_finds_compat(checkout):
    code = """
        import multiprocessing
        from verl_fl_overlay import compat
        from verl_fl_overlay.compat.release import check

        with multiprocessing.get_context("spawn").Pool(1) as pool:  # it is sent the class by name
            verl = pool.apply(compat.InstalledVerl, ("0.9.1", ""))
        print(compat.__file__, compat.__name__, check.__name__, compat.select(verl).name, compat.RELEASES)
    """
    said = output(code, env={"PYTHONPATH": str(checkout)})
    names = "verl_fl_overlay.compat verl_fl_overlay.compat.release.check"
    assert said == f"{checkout / 'compat' / '__init__.py'} {names} v0_9 {compat.RELEASES}"


def test_a_checkout_that_is_not_installed_runs_as_a_module(checkout):
    done = run("-m", "verl_fl_overlay", "--version", env={}, cwd=checkout)
    assert done.stdout == f"verl-fl-overlay {__version__}\n", done.stderr


def test_a_release_is_its_pin_file(checkout):
    pins = checkout / "compat" / "pins"
    for name in ("0.10.0.json", "0.9.1.post1.json", "0.9.2.json.part", "0.9.2.dev0.json", "latest.json", "v0.9.3.json"):
        (pins / name).touch()
    code = "from verl_fl_overlay import compat; print(compat.RELEASES)"
    assert output(code, env={"PYTHONPATH": str(checkout)}) == str((*compat.RELEASES, "0.9.1.post1", "0.10.0"))
    for file in pins.glob("*.json"):
        file.unlink()
    code += "; compat.select(compat.InstalledVerl('0.9.1', ''))"
    assert "holds the pins of no release: reinstall" in run("-c", code, env={"PYTHONPATH": str(checkout)}).stderr


def test_a_package_without_compat_says_so_in_a_line(checkout):
    (checkout / "compat").rename(checkout / "elsewhere")
    installed_with_e = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
    done = run("-c", installed_with_e + "import verl_fl_overlay", env={}, cwd=checkout)
    assert done.stderr.strip().splitlines()[-1].endswith("copy both, or pip install verl-fl-overlay")
