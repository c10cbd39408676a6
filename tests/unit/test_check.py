"""The command ``verl-fl check``: exit status, verdict, JSON, and that it needs no more than the source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import verl_trees

from verl_fl_overlay import cli, compat


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    newest = verl_trees.newest()
    shutil.copytree(newest.folder / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(copy: Path, path: str, old: str, new: str) -> None:
    file = copy / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def run(copy: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = cli.main(["check", str(copy), *options])
    return status, capsys.readouterr().out


def test_holds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1] == f"verl {verl_trees.newest().version} works"
    assert "engine.new" in out


def test_required_hook_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/engine/base.py", "def train_batch(", "def train_one_batch(")
    status, out = run(copy, capsys)
    assert status == 1
    moved = "verl.workers.engine.base:BaseEngine.train_batch -> verl.workers.engine.base:BaseEngine.train_one_batch"
    assert f"MOVED {moved} " in out
    assert out.splitlines()[-1].endswith("will refuse to load: engine.train_batch")


def test_optional_hook_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/utils/model.py", "def load_valuehead_model(", "def load_value_model(")
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1].endswith("works, review these: attention.value_model")
    assert "means: attention goes on without it" in out


def test_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/engine/base.py", "def __exit__(self, exc_type,", "def __exit__(self, kind,")
    status, out = run(copy, capsys, "--json")
    result = json.loads(out)
    assert status == 1
    assert not result["holds"]
    hook = next(h for h in result["hooks"] if h["name"] == "engine.exit")
    assert hook["status"] == "SIGNATURE"
    assert hook["fatal"]
    assert "exc_type" in hook["detail"]
    assert any(line.startswith("+def __exit__(self, kind,") for line in hook["diff"])


def test_against_an_older_release(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(copy, capsys, "--against", "0.7.0")
    assert status == 0
    assert "(against verl 0.7.0)" in out or verl_trees.newest().version == "0.7.0"


def test_a_version_never_seen_is_compared_with_the_nearest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "verl/version/version").write_text("0.9.7")
    _, out = run(copy, capsys, "--json")
    against = {hook["against"] for hook in json.loads(out)["hooks"] if hook["against"]}
    assert compat.RELEASES[-1] in against


def test_imports_neither_verl_nor_torch(copy: Path) -> None:
    program = (
        "import sys; from verl_fl_overlay import cli; cli.main(['check', sys.argv[1]]); "
        "print([m for m in ('verl', 'torch', 'flag_gems', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_is_not_on_the_load_path() -> None:
    program = "import sys, verl_fl_overlay; print([m for m in sys.modules if m.startswith('verl_fl_overlay.compat.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['verl_fl_overlay.compat.pins']"
