"""What a build makes of this tree: the wheel, the sdist, and what a package index shows of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from verl_fl_overlay import __version__

ROOT = Path(__file__).parents[2]
NO_SOURCE = (".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()))
PROJECT = "https://github.com/flagos-ai/verl-fl-overlay"

pytestmark = pytest.mark.xdist_group("build")


@dataclass(frozen=True)
class Built:
    """The tree that was built from, what the wheel and the unpacked sdist contain, and the wheel's metadata."""

    tree: Path
    wheel: set[str]
    sdist: Path
    metadata: Message


def hatchling(tree: Path, kinds: list[str]) -> list[Path]:
    """Build ``kinds`` ("-t", "wheel" ...) with the backend, as pip and uv do where nobody sees it."""
    into = tree.parent / f"dist-{tree.name}"
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(into), *kinds]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return sorted(into.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build from a copy of this tree in which earlier builds, a worktree and runs have left their files.

    nox installs the build backend beside the tests.
    """
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    tree = tmp_path_factory.mktemp("build") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NO_SOURCE))
    for left in ("build/lib/verl_fl_overlay/gone.py", "verl_fl_overlay.egg-info/SOURCES.txt", "out/run.json", ".git"):
        (tree / left).parent.mkdir(parents=True, exist_ok=True)
        (tree / left).write_text("verl_fl_overlay/gone.py\n")
    sdist, wheel = sorted(hatchling(tree, ["-t", "wheel", "-t", "sdist"]), key=lambda file: file.suffix)
    with tarfile.open(sdist) as tarred:
        tarred.extractall(tree.parent, filter="data")
    with zipfile.ZipFile(wheel) as zipped:
        names = zipped.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = message_from_bytes(zipped.read(metadata))
    return Built(tree, set(names), tree.parent / f"verl_fl_overlay-{__version__}", told)


def of_the_tree(tree: Path) -> set[str]:
    """Return the files of the checkout that a wheel has to have, under their names in it."""
    kinds = ("*.py", "*.json", "*.yaml", "*.txt", "py.typed")
    found = {file for kind in kinds for top in ("verl_fl_overlay", "compat") for file in (tree / top).rglob(kind)}
    names = (file.relative_to(tree).as_posix() for file in found if "__pycache__" not in file.parts)
    return {f"verl_fl_overlay/{name}" if name.startswith("compat/") else name for name in names}


def test_a_wheel_has_the_packages_and_nothing_that_an_earlier_build_left(built):
    packed = {name for name in built.wheel if ".dist-info/" not in name}
    assert packed == of_the_tree(built.tree)
    assert "verl_fl_overlay/compat/constraints/verl-0.9.1.txt" in packed


def test_an_sdist_has_what_the_readmes_commands_need(built):
    has = {file.relative_to(built.sdist).as_posix() for file in built.sdist.rglob("*") if file.is_file()}
    sources = {
        file.relative_to(built.tree).as_posix()
        for file in built.tree.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    left = {"build/lib/verl_fl_overlay/gone.py", "verl_fl_overlay.egg-info/SOURCES.txt", "out/run.json", ".git"}
    assert has - {"PKG-INFO"} == sources - left
    assert {"noxfile.py", "examples/sft.py", "tools/matrix.py", "compat/README.md", "CHANGELOG.md"} <= has


def test_a_wheel_made_from_the_sdist_is_the_same(built):
    (wheel,) = hatchling(built.sdist, ["-t", "wheel"])
    with zipfile.ZipFile(wheel) as zipped:
        assert set(zipped.namelist()) == built.wheel


def test_tests_run_from_the_sdist(built):
    environment = {**os.environ, "PYTHONPATH": str(built.sdist), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_structure.py"]
    done = subprocess.run(pytest_of, cwd=built.sdist, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_nox_lists_its_sessions_in_the_sdist(built):
    nox = shutil.which("nox") or pytest.skip("nox is not here")
    done = subprocess.run([nox, "-l"], cwd=built.sdist, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "compat(verl='0.9.1')" in done.stdout


def test_links_work_on_an_index(built):
    """There the README stands alone: each link is absolute, and one into the project leads to a file that exists."""
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    text = built.metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    urls = [url.partition(", ")[2] for url in built.metadata.get_all("Project-URL")]
    own = [link for link in (*links, *urls) if link.startswith(PROJECT)]
    places = {re.sub(rf"{PROJECT}(/(blob|raw|tree)/(v{re.escape(__version__)}|main)/|/issues$|$)", "", p) for p in own}
    assert [place for place in places if not (built.sdist / place.partition("#")[0]).exists()] == []
    assert len(places) > 3


def test_project_urls(built):
    labels = {url.partition(", ")[0] for url in built.metadata.get_all("Project-URL")}
    assert labels == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}


def test_only_three_hard_dependencies(built):
    needs = [Requirement(text) for text in built.metadata.get_all("Requires-Dist")]
    assert {need.name for need in needs if need.marker is None} == {"wrapt", "packaging", "rich"}


def test_no_extra_brings_what_constraints_must_hold(built):
    """An extra has no constraints: with verl or FlagGems in one, pip takes versions that do not fit."""
    needs = [text for text in built.metadata.get_all("Requires-Dist") if "extra ==" in text]
    assert {re.split(r"\W", text)[0] for text in needs} == {"pyyaml", "matplotlib"}


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == __version__


def test_the_constraints_hold_what_the_overlay_itself_needs(built):
    needed = {Requirement(text).name for text in built.metadata.get_all("Requires-Dist") if "extra" not in text}
    assert {"wrapt", "packaging", "rich"} <= needed
    for file in (built.tree / "compat" / "constraints").glob("verl-*.txt"):
        held = {line.partition("==")[0] for line in file.read_text(encoding="utf-8").splitlines()}
        assert needed <= held, file.name
