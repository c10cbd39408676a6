"""What ``verl-fl check`` takes as its target, and what it says of targets that are damaged or are not verl."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import verl_trees

from verl_fl_overlay import cli
from verl_fl_overlay.compat.release import pinning, sources
from verl_fl_overlay.compat.release.sources import Tree, opened
from verl_fl_overlay.errors import OverlayError

FILES = {"verl/version/version": "0.9.1\n", "verl/protocol.py": "x = 1\n", "verl/data.bin": "no python"}


def wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, text in files.items():
            zipped.writestr(name, text)
    return path


def sdist(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tarred:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tarred.addfile(member, io.BytesIO(text.encode()))
    return path


def folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def assert_is_verl(target: str) -> None:
    with opened(target) as tree:
        assert tree.version == "0.9.1"
        assert tree.read("verl/protocol.py") == "x = 1\n"
        assert tree.read("verl/absent.py") is None
        assert tree.files() == ["verl/protocol.py"]


def refused(target: str, *said: str) -> None:
    with pytest.raises(OverlayError) as caught, opened(target):
        pass
    for words in said:
        assert words in str(caught.value)


def test_wheel(tmp_path: Path) -> None:
    assert_is_verl(str(wheel(tmp_path / "verl.whl", FILES)))


def test_sdist(tmp_path: Path) -> None:
    assert_is_verl(str(sdist(tmp_path / "verl.tar.gz", {f"verl-0.9.1/{name}": text for name, text in FILES.items()})))


def test_folder_and_the_package_in_it(tmp_path: Path) -> None:
    folder(tmp_path, FILES)
    assert_is_verl(str(tmp_path))
    assert_is_verl(str(tmp_path / "verl"))


def test_checkout_at_a_ref(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    folder(tmp_path, FILES)
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x")
    git("tag", "v0.9.1")
    (tmp_path / "verl/protocol.py").write_text("changed in the folder")
    assert_is_verl(f"{tmp_path}@v0.9.1")
    refused(f"{tmp_path}@v9", "v9", "git fetch")
    refused(f"{tmp_path}@--upload-pack=x", "no git ref")


def test_not_verl(tmp_path: Path) -> None:
    other = {"other/__init__.py": ""}
    for target in (
        wheel(tmp_path / "other.whl", other),
        sdist(tmp_path / "other.tar.gz", other),
        folder(tmp_path / "o", other),
    ):
        refused(str(target), "does not hold verl", "verl/version/version")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_truncated(part: float, tmp_path: Path) -> None:
    for made in (wheel(tmp_path / "verl.whl", FILES), sdist(tmp_path / "verl.tar.gz", FILES)):
        data = made.read_bytes()
        made.write_bytes(data[: int(len(data) * part)])
        refused(str(made), made.name)


def test_damaged_member(tmp_path: Path) -> None:
    made = wheel(tmp_path / "verl.whl", FILES)
    made.write_bytes(made.read_bytes().replace(b"x = 1", b"x = 2"))
    refused(str(made), "verl.whl is damaged", "CRC")


@pytest.mark.parametrize("name", ["../outside.py", "/outside.py", "verl/../../outside.py", "..\\outside.py", "C:/x.py"])
def test_path_that_climbs_out(name: str, tmp_path: Path) -> None:
    for made in (wheel(tmp_path / "v.whl", {**FILES, name: "x"}), sdist(tmp_path / "v.tar.gz", {**FILES, name: "x"})):
        refused(str(made), "climbs out")
    assert not list(tmp_path.parent.rglob("outside.py"))


def test_link_in_an_sdist_is_left_out(tmp_path: Path) -> None:
    made = sdist(tmp_path / "verl.tar", {})
    with tarfile.open(made, "w") as tarred:
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tarred.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("verl/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tarred.addfile(link)
    assert_is_verl(str(made))


def test_neither_file_nor_version() -> None:
    refused("no-such-thing", "no file, no folder and no version", "latest")


def test_unreachable_index(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("PIP_NO_INDEX", "UV_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    assert cli.main(["check", "0.9.1"]) == 2
    said = capsys.readouterr().err
    assert "cannot be reached" in said or "neither is here" in said
    assert said.count("\n") == 1


def test_syntax_error_in_a_hooked_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest: Tree = verl_trees.newest()
    shutil.copytree(newest.folder / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "verl/workers/engine/base.py"
    file.write_text(file.read_text() + "\ndef broken(:\n")
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "verl/workers/engine/base.py, line" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe")
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "verl/workers/engine/base.py is not UTF-8" in capsys.readouterr().err


def test_too_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, {"verl/version/version": "0.6.1"})
    said = "verl 0.6.1 is older than 0.7.0, the oldest release that verl-fl-overlay has hooks for: "
    for target in (str(tmp_path), str(wheel(tmp_path / "old.whl", {"verl/version/version": "0.6.1"}))):
        assert cli.main(["check", target]) == 1
        assert capsys.readouterr().out == f"{said}verl-fl install-hint verl\n"
    assert cli.main(["check", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False


def test_too_old_by_its_version_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("it was downloaded"))
    for version in ("0.6.1", "verl==0.6.1", "0.6.1.dev0", "0.1"):
        assert cli.main(["check", version]) == 1
        captured = capsys.readouterr()
        assert (captured.out.count("\n"), captured.err) == (1, "")
        assert "is older than 0.7.0" in captured.out


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip ask an index with wheels of verl, 0.9.2 being for a later Python, and the source alone of 0.9.3."""
    if not sources._pip():
        pytest.skip("pip is not here")
    page = tmp_path / "simple/verl"
    page.mkdir(parents=True)
    links = []
    later = 'data-requires-python="&gt;=3.99"'
    for version, attributes in {"0.8.0": "", "0.9.1": "", "0.9.2": later, "1.0rc1": ""}.items():
        name = f"verl-{version}-py3-none-any.whl"
        metadata = {
            f"verl-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n",
            f"verl-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"verl-{version}.dist-info/RECORD": "",
        }
        wheel(page / name, {"verl/version/version": version, **metadata})
        links.append(f'<a href="{name}" {attributes}>{name}</a>')
    links.append('<a href="verl-0.9.3.tar.gz">verl-0.9.3.tar.gz</a>')
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", page.parent.as_uri())
    monkeypatch.setattr(sources, "_installer", lambda: [*sources._pip(), "install", "--quiet", "--no-compile"])


def test_latest_tells_what_is_newer_and_why_it_was_not_taken(index: None) -> None:
    with opened("latest") as tree:
        assert tree.version == "0.9.1"
        python = platform.python_version()
        newer = f"0.9.2 (not for Python {python}), 0.9.3 (without a wheel), 1.0rc1 (a pre-release)"
        assert tree.origin == f"the package index, which has newer ones: {newer}"
    with opened("0.9.1") as tree:
        assert tree.origin == "the package index"


def test_a_version_that_the_index_does_not_give(index: None) -> None:
    python = platform.python_version()
    refused("0.9.2", f"verl==0.9.2 is for Python >=3.99, and this is {python}; name a wheel or a folder instead")
    refused("9.9.9", "the package index has no wheel of verl==9.9.9; its newest ones are ")
    refused("9.9.9", "1.0rc1")


def test_release_that_is_not_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, FILES)
    assert cli.main(["check", str(tmp_path), "--against", "0.6.0"]) == 2
    assert "pinned are 0.7.0" in capsys.readouterr().err


def test_development_version_in_an_archive_is_told_apart_by_what_it_has(tmp_path: Path) -> None:
    files = {"verl/version/version": "0.8.0.dev", "verl/workers/engine/base.py": "", "verl/workers/fsdp_workers.py": ""}
    with opened(str(wheel(tmp_path / "old.whl", files))) as tree:
        assert pinning.shim_for(tree).name == "v0_7"
    files["verl/plugin/platform/platform_manager.py"] = ""
    with opened(str(wheel(tmp_path / "new.whl", files))) as tree:
        assert pinning.shim_for(tree).name == "v0_9"
