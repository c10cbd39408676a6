"""A program in a fork of the warm process behaves as one that is started alone."""

from __future__ import annotations

import subprocess
import time

import pytest

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

from processes import before_others, output, python, run, warm

pytestmark = pytest.mark.xdist_group("warm")  # they share the process

TELLS = """
import atexit, os, sys
atexit.register(lambda: print("at the end"))
class Here: pass
print(sys.argv, sys.path[0], os.getcwd(), os.environ.get("OF_THE_TEST"), __name__, Here.__module__, sys.stdin.read())
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise SystemExit('said')", "1 / 0", "os._exit(7)"])
@pytest.mark.parametrize("kind", ["-c", "a file", "-m"])
def test_it_ends_and_tells_as_alone(kind, end, tmp_path):
    (tmp_path / "program.py").write_text(TELLS + end)
    command = {"-c": ["-c", TELLS + end], "a file": [tmp_path / "program.py"], "-m": ["-m", "program"]}[kind]
    environment = {"OF_THE_TEST": "yes", "PYTHONPATH": str(tmp_path)}
    forked, alone = (start(*command, "a", "b", env=environment, cwd=tmp_path) for start in (warm, run))
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    assert forked.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


@pytest.mark.parametrize("start", [run, warm])
def test_it_finds_what_this_process_finds(start, tmp_path, monkeypatch):
    """verl itself may be here by PYTHONPATH alone, as on a cluster with storage that its nodes share."""
    for folder in ("ours", "users"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.py").write_text(f"name = {folder!r}")
    (tmp_path / "users" / "alone.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "users"))
    assert output("import alone, both; print(both.name)", env=before_others(tmp_path / "ours"), start=start) == "ours"


def test_nothing_of_one_program_is_left_for_the_next():
    assert output("import sys, verl; print('verl' in sys.modules)", env={}, start=warm) == "True"
    assert output("import sys; print('verl' in sys.modules)", env={}, start=warm) == "False"


def test_what_takes_too_long_is_ended():
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        python("import time; time.sleep(600)", env={}, start=warm, timeout=2)
    assert time.monotonic() - begun < 60


def test_ranks_find_each_other_and_one_that_fails_ends_the_others():
    program = """
    import os, sys, time
    import torch.distributed as group
    group.init_process_group("gloo")
    told = [None] * group.get_world_size()
    group.all_gather_object(told, os.environ["LOCAL_RANK"])
    if group.get_rank():
        sys.exit(5)
    print(told, flush=True)
    time.sleep(600)
    """
    done = python(program, env={}, start=warm, ranks=2, timeout=60)
    assert done.stdout in ("", "['0', '1']\n")  # it may be ended before
    assert done.returncode == 5
