"""Several real processes that want the same compiled or tuned: one does it, the others find it done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from verl_fl_overlay.kernels import turns

PROGRAM = """
import json, logging, os, sys, time
from pathlib import Path
from verl_fl_overlay.kernels import turns

folder, seconds, turns.LONGEST_WAIT = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
print("started", flush=True)
sys.stdin.readline()
with turns.first_in(folder, "tuning mm") as turn:
    found = turn.left
    if not found:
        with open(folder / "tuned", "a") as tuned:
            tuned.write(f"{os.getpid()}\\n")
        print("tuning", flush=True)
        time.sleep(seconds)
        turn.left = "64x64"
print(json.dumps(found))
"""


class Process:
    started: list[subprocess.Popen] = []

    def __init__(self, folder: Path, seconds: float = 0.5, longest_wait: float = 60):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(seconds), str(longest_wait)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        self.started.append(self.process)
        assert self.process.stdout.readline() == "started\n"

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def told(self) -> tuple[str, str]:
        """Return what it found there and what it logged."""
        out, log = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, log
        return json.loads(out.splitlines()[-1]), log


@pytest.fixture(autouse=True)
def none_is_left():
    """End the processes that a test which failed would leave asleep."""
    yield
    while Process.started:
        process = Process.started.pop()
        process.kill()
        process.communicate()


def tuned(folder: Path) -> int:
    return len((folder / "tuned").read_text().splitlines())


def test_one_process_tunes_and_the_others_find_its_result(tmp_path):
    processes = [Process(tmp_path) for _ in range(4)]
    results = [process.told() for process in [process.go() for process in processes]]
    assert tuned(tmp_path) == 1
    assert Counter(found for found, _ in results) == {"": 1, "64x64": 3}
    assert Process(tmp_path).go().told()[0] == "64x64"  # a later run too
    assert tuned(tmp_path) == 1


def test_the_turn_of_a_killed_process_goes_to_one_of_those_that_wait(tmp_path):
    held = Process(tmp_path, seconds=600).go()
    assert held.process.stdout.readline() == "tuning\n"
    waiting = [Process(tmp_path).go() for _ in range(3)]
    held.process.kill()
    held.process.communicate()
    results = [process.told() for process in waiting]
    assert tuned(tmp_path) == 2
    assert Counter(found for found, _ in results) == {"": 1, "64x64": 2}


def test_a_wait_has_an_end_and_is_told_once(tmp_path):
    held = Process(tmp_path, seconds=600).go()
    assert held.process.stdout.readline() == "tuning\n"
    found, log = Process(tmp_path, seconds=0, longest_wait=0.3).go().told()
    held.process.kill()
    held.process.communicate()
    assert found == ""
    assert log.splitlines() == [
        "INFO waiting for another process of this node: tuning mm",
        "WARNING another process takes more than 0 s, not waited for: tuning mm",
    ]


def test_an_exception_passes_and_the_next_one_is_the_first(tmp_path):
    with pytest.raises(ZeroDivisionError), turns.first_in(tmp_path, "x"):
        raise ZeroDivisionError
    with turns.first_in(tmp_path, "x") as turn:
        assert turn.left == ""
    with turns.first_in(tmp_path, "x") as turn:
        assert turn.left == "done"


def test_a_process_does_not_wait_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "LONGEST_WAIT", 10.0)
    with turns.first_in(tmp_path, "x") as turn:
        begun = time.monotonic()
        with turns.first_in(tmp_path, "x") as inner:
            inner.left = "of the policy inside"
        assert time.monotonic() - begun < 5
        turn.left = "of the whole"
    with turns.first_in(tmp_path, "x") as turn:
        assert turn.left == "of the whole"


def test_where_nothing_can_be_written_everybody_is_the_first(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for _ in range(2):
        with turns.first_in(file / "folder", "x") as turn:
            assert turn.left == ""


def test_the_turn_lies_in_triton_s_cache_and_each_chip_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for chip in ("one chip", "another"):
        monkeypatch.setattr(turns.accelerator, "chip_name", lambda chip=chip: chip)
        with turns.first_to_compile("a kernel") as turn:
            assert os.listdir(tmp_path / "cache") == ["verl_fl_turns"]
            assert turn.left == ""
        with turns.first_to_compile("a kernel") as turn:
            assert turn.left == "done"
