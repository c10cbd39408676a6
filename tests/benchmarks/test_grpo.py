"""The benchmark of GRPO, without a run: what it prints of results, refuses, and leaves behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "grpo.py"


@pytest.fixture
def grpo(monkeypatch):
    """Return the benchmark, whose name an example has too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_of_grpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def result(row, seconds, reward=0.5, apart=0.001):
    steps = [
        {"number": n, "step": s, "reward": reward, "entropy": 0.5, "probability difference": apart, "counted": n > 1}
        for n, s in enumerate(seconds, 1)
    ]
    about = {"row": row, "variant": "", "device": "none", "versions": {}, "model": "tiny"}
    return {"steps": steps, "asked steps": len(steps), **about}


def test_runs_of_two_files_are_not_mixed(grpo, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, seconds in zip(files, ((9.0, 1.25), (9.0, 3.75)), strict=True):
        file.write_text(json.dumps({"overlay": result("overlay", seconds)}))
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--merge", *map(str, files)])
    assert grpo.main() == 0
    printed = capsys.readouterr().out
    assert "1.25" in printed.partition("two.json")[0]
    assert "3.75" in printed.partition("two.json")[2]


def test_a_first_step_is_never_a_median(grpo):
    assert grpo.median(result("overlay", (9.0, 1.0, 2.0)), "step") == 1.5
    assert grpo.median(result("overlay", (9.0,)), "step") is None


@pytest.mark.parametrize("wrong", [{"reward": float("nan")}, {"apart": float("nan")}, {"reward": 0.9}, {"apart": 0.1}])
def test_numbers_that_are_not_alike_are_told(grpo, wrong):
    rows = {"overlay": result("overlay", (9.0, 1.0)), "padded": result("padded", (9.0, 1.0))}
    assert grpo.disagreements(rows) == []
    assert grpo.disagreements({**rows, "overlay": result("overlay", (9.0, 1.0), **wrong)})


@pytest.mark.parametrize("wrong", [("--steps", "1"), ("--turns", "-1"), ("--gpus", "0"), ("--lessons", "0")])
def test_what_cannot_be_measured_is_refused(grpo, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--folder", str(tmp_path), *wrong])
    with pytest.raises(SystemExit, match="2"):
        grpo.main()
    assert f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err


def test_a_run_takes_its_turn_and_ends_with_the_benchmark(grpo, tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for name, value in (("FOLDER", tmp_path), ("RUN", "a"), ("ANSWERS", 2), ("STEPS", 1), ("PROCESS", process.pid)):
        monkeypatch.setenv(f"TURNS_{name}", str(value))
    (tmp_path / "a.goes-0").touch()
    turns = importlib.import_module("turns").Turns()
    turns.answer()
    turns.answer()
    assert (tmp_path / "a.waits-0").exists()
    assert (tmp_path / "a.answers").read_text().startswith("1 0.")
    process.communicate(b"\n")
    with pytest.raises(RuntimeError, match="has ended"):
        turns.answer()


def test_runs_end_together_and_leave_nothing(grpo, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "GRACE", 2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    started = []
    for name in ("one", "two", "three"):
        (tmp_path / name / "session").mkdir(parents=True)
        process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        started.append(SimpleNamespace(process=process, ended=False, ray=str(tmp_path / name)))
    begun = time.monotonic()
    grpo.end(started)
    assert time.monotonic() - begun < 4
    assert all(each.process.returncode == -9 for each in started)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_used_by_one_benchmark_and_by_the_runs_that_outlive_it(grpo, tmp_path, monkeypatch):
    started = []

    def sleeping(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    popen = subprocess.Popen
    lock = grpo.locked(tmp_path, "somebody")
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"is in use by another grpo\.py"):
        grpo.main()
    with monkeypatch.context() as patched:
        patched.setattr(grpo.subprocess, "Popen", sleeping)
        plan = grpo.Plan(tmp_path, "tiny", 1, 2, 1, False)
        shutil.rmtree(grpo.Started(grpo.Run("padded", "", tmp_path / "padded"), plan, tmp_path, lock).ray)
    lock.close()  # as if the benchmark were killed
    with pytest.raises(SystemExit, match="is in use by somebody: name another --folder, or wait"):
        grpo.locked(tmp_path, "somebody")
    started[0].kill()
    started[0].wait()
    grpo.locked(tmp_path, "somebody").close()


def test_a_row_that_is_named_twice_runs_once(grpo):
    assert grpo.chosen("overlay,padded,overlay", grpo.ROWS, "rows", None) == ["overlay", "padded"]


def test_results_that_cannot_be_written_are_told_before_anything_runs(grpo, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "prepare", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--folder", str(tmp_path), "--json", str(tmp_path)])
    with pytest.raises(IsADirectoryError):
        grpo.main()
