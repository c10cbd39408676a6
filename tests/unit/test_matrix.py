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
    """Return the exit status and the last line of the table for one row."""
    ran_on = {"verl": "0.9.1", "torch": "2.13.0", "python": "3.11.7", "flag_gems": "-", "wrapt": "2.5.2"}
    row = {**ran_on, "device": "cpu", "date": "2026-01-02", **more}
    (folder / "row.json").write_text(json.dumps(row))
    if junit is not None:
        (folder / "row.xml").write_text(f"<testsuites><testsuite>{junit}</testsuite></testsuites>")
    command = [sys.executable, ROOT / "tools" / "matrix.py", folder, "--print"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("junit", "more", "status", "said"),
    [
        (PASSED, {}, 0, "train 1 2026-01-02"),
        (PASSED + SKIPPED, {}, 0, "train 1, gpu 0 (1 skipped) 2026-01-02"),
        (PASSED + FAILED, {}, 1, "train 1 (1 failed) 2026-01-02"),
        (PASSED + FAILED, {"may fail": True}, 0, "train 1 (1 failed) - it may 2026-01-02"),
        (PASSED, {"may fail": True}, 0, "train 1 2026-01-02"),
        (None, {"may fail": True, "failed": "cannot be installed"}, 0, "cannot be installed - it may 2026-01-02"),
        (None, {}, 1, "FAILED before its tests 2026-01-02"),
        (None, {"failed": "cannot be installed"}, 1, "cannot be installed 2026-01-02"),
        (None, {"not run": "no NPU"}, 0, "not run: no NPU"),
        (None, {"not run": ""}, 0, "not run"),
    ],
)
def test_row(junit: str | None, more: dict[str, Any], status: int, said: str, tmp_path: Path) -> None:
    found, line = table(tmp_path, junit, **more)
    assert (found, " ".join(line.split()[6:])) == (status, said)


def test_without_results_it_fails(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "matrix.py", tmp_path, "--print"], check=False)
    assert done.returncode == 1
