"""A bundle has what was asked for and no torch, and is installed only where it fits and as it was made."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import bundle
import bundle_install
import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.cli.install_hint import ADDITIONS

NEWEST = compat.RELEASES[-1]
HERE = ".".join(platform.python_version_tuple()[:2])


def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return what the program prints for these arguments."""
    monkeypatch.setattr(sys, "argv", ["bundle.py", *map(str, arguments)])
    bundle.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("components", "names", "constrained"),
    [
        ([], [f"verl=={NEWEST}", "einops"], True),
        (["flaggems"], [f"verl=={NEWEST}", "flag-gems==5.0.0"], True),
        (["flaggems", "megatron"], [f"verl=={NEWEST}", "flag-gems==5.0.0", "megatron-core==0.16.1"], True),
        (["vllm", "flaggems"], ["'verl[vllm]==0.9.1'", "flag-gems==5.0.0"], False),
    ],
)
def test_pip_is_asked_for_what_install_hint_says(components, names, constrained, monkeypatch, capsys) -> None:
    options = [option for name in components for option in ("--with", name)]
    words = asked(monkeypatch, capsys, "x", "--torch", "2.11.0+cu130", "--dry-run", *options).split()
    assert [name for name in [*names, "torch==2.11.0+left.out"] if name not in words] == []
    assert len([word for word in words if word.strip("'").startswith("verl")]) == 1
    assert [word for word in words if word.endswith(f"verl-{NEWEST}.txt")] != [] if constrained else "-c" not in words


def test_of_each_component_a_bundle_has_a_line_or_says_why_not() -> None:
    refused = {}
    for release in compat.RELEASES:
        for name in ADDITIONS:
            try:
                assert bundle.requirements(name, release, "2.11.0", "nvidia")
            except SystemExit as why:
                refused[name] = str(why)
    assert {"flagcx", "te-fl", "flash-attn"} <= refused.keys()
    assert not refused.keys() & {"verl", "flaggems", "megatron", "vllm"}
    assert [name for name, why in refused.items() if len(why) < 60] == [], "no reason"


def test_another_machine_is_asked_for_by_all_tags_that_it_can_use() -> None:
    assert bundle.target(HERE, platform.machine(), 0) == []
    options = bundle.target("3.12", "aarch64", 17)
    tags = [option for option in options if option.endswith("_aarch64")]
    assert {"manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"} <= set(tags)
    assert "manylinux_2_18_aarch64" not in tags
    assert options[:2] == ["--python-version", "3.12"]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return a bundle's folder, and what pip was asked, for which empty wheels stand."""
    commands = []

    def pip(action: str, *arguments: str | Path) -> None:
        commands.append([action, *map(str, arguments)])
        to = Path(arguments[arguments.index("--wheel-dir" if action == "wheel" else "--dest") + 1])
        to.mkdir(exist_ok=True)
        names = (
            ["verl_fl_overlay-0.1.0"]
            if action == "wheel"
            else [f"verl-{NEWEST}", "wrapt-2.5.2", "torch-2.11.0+left.out"]
        )
        for name in names:
            (to / f"{name}-py3-none-any.whl").write_bytes(b"x" * 1000)

    monkeypatch.setattr(bundle, "pip", pip)
    monkeypatch.setattr(bundle, "repository", lambda folder: (folder / "examples").mkdir(parents=True))
    monkeypatch.setattr(bundle, "run", lambda *command: "1a2b3c")
    folder = tmp_path / "bundle"
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(folder), "--torch", "2.11.0"])
    assert bundle.main() == 0
    return argparse.Namespace(folder=folder, commands=commands)


def test_a_bundle_has_wheels_pins_and_digests_and_no_torch(made: argparse.Namespace) -> None:
    manifest = json.loads((made.folder / "MANIFEST.json").read_text())
    there = {str(file.relative_to(made.folder)) for file in made.folder.rglob("*") if file.is_file()}
    assert manifest["sha256"].keys() == there - {"MANIFEST.json"}
    assert (made.folder / "requirements.txt").read_text().split() == [f"verl=={NEWEST}", "wrapt==2.5.2"]
    assert [file.name for file in made.folder.rglob("torch*")] == []
    assert (manifest["torch"], manifest["commit"], manifest["python"]) == ("2.11.0", "1a2b3c", HERE)
    download = made.commands[-1]
    assert [name for name in download if name.startswith("pytest")] == ["pytest", "pytest-xdist"]
    assert [path.name for path in made.folder.parent.iterdir()] == ["bundle"], "nothing else is left there"


def test_what_stands_for_torch_is_a_wheel_of_its_version(tmp_path: Path) -> None:
    bundle.left_out("2.11.0+left.out", tmp_path)
    (wheel,) = tmp_path.iterdir()
    name, version, _, _ = bundle.parse_wheel_filename(wheel.name)
    assert (name, str(version)) == ("torch", "2.11.0+left.out")
    with zipfile.ZipFile(wheel) as files:
        assert b"Requires-Dist" not in files.read("torch-2.11.0+left.out.dist-info/METADATA")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--torch", "new"], "--torch new is no version"),
        (["--torch", "2.11"], "--torch 2.11 is no whole version: one is such as 2.11.0"),
        (["--torch", "2.11.0", "--python", "3.12.4"], "--python 3.12.4: needed are two numbers"),
        (["--torch", "2.11.0", "--machine", "amd64"], "invalid choice: 'amd64'"),
        (["--torch", "2.11.0", "--verl", "9.9"], "invalid choice: '9.9'"),
        (["--torch", "2.11.0", "--with", "nothing"], "invalid choice: 'nothing'"),
        (["--torch", "2.11.0", "--with", "te-fl", "--dry-run"], "te-fl cannot be put into a bundle. Transf"),
        (["--torch", "2.11.0"], "is there and not an empty folder"),
        ([], "required: --torch"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as refused:
        asked(monkeypatch, capsys, tmp_path, *arguments)
    assert said in f"{refused.value} {capsys.readouterr().err}"
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_what_is_too_large_is_refused_and_nothing_is_left(made, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match=r"the wheels take 0.00 GB, and --max-size is 1e-06; the largest: .*verl-"):
        asked(monkeypatch, capsys, tmp_path / "small", "--torch", "2.11.0", "--max-size", "1e-6")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_pip_s_own_failure_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no bundle was made: .*-c .* failed, and said why above"):
        bundle.run(sys.executable, "-c", "raise SystemExit(1)", folder=tmp_path)


def install(folder: Path) -> str:
    """Return what the installer says against a bundle here."""
    done = subprocess.run([sys.executable, folder / "install.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_it_is_installed_only_where_it_fits_and_as_it_was_made(made: argparse.Namespace) -> None:
    file = made.folder / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "python": "2.7", "machine": "abacus", "torch": "1.0"}))
    (made.folder / "requirements.txt").write_text("other")
    shutil.rmtree(made.folder / "wheels")
    said = install(made.folder)
    assert said.startswith("nothing was installed:\n")
    assert f"it was made for python 2.7, and here is {HERE}" in said
    assert f"it was made for machine abacus, and here is {platform.machine()}" in said
    assert "it was made for torch 1.0, and here is " in said
    assert "requirements.txt is not as it was when the bundle was made: copy it again" in said
    assert "wheels/wrapt-2.5.2-py3-none-any.whl is missing" in said
    file.unlink()
    assert "has no MANIFEST.json: it is no whole bundle; copy it again" in install(made.folder)


def test_nothing_speaks_against_it_where_it_was_made(made: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_install, "HERE", made.folder)
    monkeypatch.setattr(bundle_install.importlib.metadata, "version", lambda name: "2.11.0+cu130")
    assert bundle_install.wrong(json.loads((made.folder / "MANIFEST.json").read_text())) == []


@pytest.fixture
def installed(made: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return a bundle that fits here, with a program that makes the data; ``main`` installs it, pip aside."""
    program, data = made.folder / "repository" / "examples" / "arithmetic.py", made.folder / "repository/out/arithmetic"
    monkeypatch.setattr(bundle_install, "HERE", made.folder)
    monkeypatch.setattr(bundle_install, "DATA", data)
    monkeypatch.setattr(bundle_install, "wrong", lambda manifest: [])
    run = subprocess.run

    def without_pip(command: list[str], **options: object) -> object:
        return run([sys.executable, "-c", ""] if "pip" in command else command, **options)

    monkeypatch.setattr(bundle_install.subprocess, "run", without_pip)

    def makes(more: str = "") -> None:
        lines = ["import os, sys", "from pathlib import Path", "new = Path(sys.argv[1])", "(new / 'one').touch()", more]
        program.write_text("\n".join([*lines, "(new / 'two').touch()"]))

    return argparse.Namespace(main=bundle_install.main, data=data, makes=makes)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_data_that_was_cut_is_made_again(installed: argparse.Namespace) -> None:
    installed.makes("raise SystemExit(3)")
    assert installed.main() == 3
    assert names(installed.data.parent) == []
    installed.makes()
    assert installed.main() == 0
    assert names(installed.data) == ["one", "two"]


def test_of_two_machines_the_first_one_makes_the_data(installed: argparse.Namespace) -> None:
    installed.makes(f"other = Path({str(installed.data)!r}); other.mkdir(); (other / 'theirs').touch()")
    assert installed.main() == 0
    assert names(installed.data.parent) == ["arithmetic"]
    assert names(installed.data) == ["theirs"]


def test_a_bundle_that_cannot_be_written_is_installed(installed: argparse.Namespace, capsys) -> None:
    installed.makes()
    installed.data.parent.touch()  # as a folder that is read-only, for root too
    assert installed.main() == 0
    said = capsys.readouterr().out
    assert "no tiny model was made: " in said
    assert "installed; next: " in said
