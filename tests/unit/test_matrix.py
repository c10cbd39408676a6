"""The table of the matrix says what the results say, and fails where a row failed that may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PASSED = '<testcase classname="tests.train.test_x" name="a"/>'
FAILED = '<testcase classname="tests.train.test_x" name="b"><failure message="x"/></testcase>'
SKIPPED = '<testcase classname="tests.gpu.test_y" name="c"><skipped message="x"/></testcase>'


def table(folder: Path, junit: str | None, **more: Any) -> tuple[int, str]:
    """Return the exit status, and date and tests of the table's one row."""
    ran_on = {"verl": "0.9.1", "torch": "2.13.0", "python": "3.11.7", "flag_gems": "-", "wrapt": "2.5.2"}
    row = {**ran_on, "date": "2026-01-02", **more}
    (folder / "row.json").write_text(json.dumps(row))
    (folder / "other.json").write_text("a row that nobody asked for")
    if junit is not None:
        (folder / "row.xml").write_text(f"<testsuites><testsuite>{junit}</testsuite></testsuites>")
    command = [sys.executable, ROOT / "tools" / "matrix.py", folder, "row"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    _, line, *tests = done.stdout.splitlines()
    return done.returncode, " ".join([*line.split()[5:], *map(str.strip, tests)])


@pytest.mark.parametrize(
    ("junit", "more", "status", "said"),
    [
        (PASSED, {}, 0, "2026-01-02 train 1"),
        (PASSED + SKIPPED, {}, 0, "2026-01-02 train 1, gpu 0 (1 skipped)"),
        (PASSED + FAILED, {}, 1, "2026-01-02 train 1 (1 failed)"),
        (PASSED + FAILED, {"may fail": True}, 0, "2026-01-02 train 1 (1 failed) - it may"),
        (PASSED, {"may fail": True}, 0, "2026-01-02 train 1"),
        (None, {"may fail": True, "failed": "cannot be installed"}, 0, "2026-01-02 cannot be installed - it may"),
        (None, {}, 1, "2026-01-02 FAILED before its tests"),
        (None, {"failed": "cannot be installed"}, 1, "2026-01-02 cannot be installed"),
        (None, {"not run": "no disk"}, 0, "not run: no disk"),
        (None, {"not run": ""}, 0, "not run"),
    ],
)
def test_row(junit: str | None, more: dict[str, Any], status: int, said: str, tmp_path: Path) -> None:
    assert table(tmp_path, junit, **more) == (status, said)


def test_without_results_it_fails(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "matrix.py", tmp_path, "row"], check=False)
    assert done.returncode == 1


def test_it_is_as_wide_as_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folders = "".join(f'<testcase classname="tests.folder{number}.test_x" name="a"/>' for number in range(20))
    _, told = table(tmp_path, folders)
    assert told.endswith("folder19 1")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "matrix.py", tmp_path, "row"], capture_output=True, text=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
