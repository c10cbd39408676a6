"""benchmarks/endurance.py on programs that grow, that do not, and that leave a process behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from processes import run

pytest.importorskip("psutil", reason="needs psutil")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "endurance.py"
# A worker of another session, whose parent is gone: Ray's are such.
TRAINER = """
import os, subprocess, sys, time
growing, kept = {growing!r}, []
if os.environ.get("WORKER"):
    title = "worker"
    for step in range(40):
        if growing == "memory":
            kept.append(bytearray(os.urandom(1 << 20)))
        if growing == "files":
            kept.append(open(os.devnull))
        if growing == "reports":
            with open(sys.argv[1] + "/report.json", "a") as report:
                report.write("x" * 5000)
        print(f"step:{{step + 1}} - loss:1.0", flush=True)
        time.sleep(0.1)
    time.sleep({lingers})
else:
    more = {{"env": {{**os.environ, "WORKER": "1"}}, "start_new_session": True}}
    subprocess.Popen(["sh", "-c", '"$@" &', "sh", sys.executable, *sys.orig_argv[1:]], **more).wait()
    time.sleep(4.5)
"""


# Each time that it is asked, every process of the trainer holds {more} MB more, and another job {other} MB more, on the
# trainer's card and in a container on a second one, whose processes are not told.
NVIDIA_SMI = """#!/bin/sh
asked=$(wc -l <"$0.asked")
case "$*" in
*compute-apps*) for pid in $(pgrep -f {folder}/trainer.py); do
    echo "$pid, GPU-0, $((1000 + {more} * asked))"; done
    echo "1, GPU-0, $((1000 + {other} * asked))" ;;
*index*) echo >>"$0.asked"; asked=$((asked + 1)); all=$(pgrep -f {folder}/trainer.py | wc -l)
    echo "0, GPU-0, $((5000 + all * (1000 + {more} * asked) + 1000 + {other} * asked))"
    echo "1, GPU-1, $((1000 + {other} * asked))" ;;
*) echo "A card" ;;
esac
"""

DEVICES = {"device memory": (20, 0), "device memory of another job": (0, 20)}


def watched(tmp_path, growing="", lingers=0, *options):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "report.json").write_text("x" * 50000)
    (tmp_path / "trainer.py").write_text(TRAINER.format(growing=growing, lingers=lingers))
    where = ("--json", tmp_path / "found.json", "--reports", tmp_path / "reports", "--every", "0.05")
    trainer = ("python", tmp_path / "trainer.py", tmp_path / "reports")
    smi = tmp_path / "bin" / "nvidia-smi"
    if growing in DEVICES:
        smi.parent.mkdir()
        smi.write_text(NVIDIA_SMI.format(folder=tmp_path, more=DEVICES[growing][0], other=DEVICES[growing][1]))
        smi.with_name("nvidia-smi.asked").touch()
        smi.chmod(0o755)
    path = os.pathsep.join([str(smi.parent), os.environ["PATH"]])
    done = run(PROGRAM, *where, *options, "--", *trainer, env={"PATH": path}, timeout=120)
    told = json.loads((tmp_path / "found.json").read_text())
    return done, told, {(row["who"].split()[0], row["what"]) for row in told["rows"] if row["grew"]}


def test_a_steady_program(tmp_path):
    done, told, grew = watched(tmp_path)
    assert grew == set()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (told["steps"], told["left behind"]) == (40, [])
    assert "step:40 - " in (tmp_path / "found.output").read_text()
    assert not (tmp_path / "found.log").exists(), "tools/gpu.py has its log there"
    assert {row["who"].split()[0] for row in told["rows"]} >= {"trainer.py", "whole"}


@pytest.mark.parametrize(
    ("growing", "found"),
    [
        ("memory", {("trainer.py", "memory, MB"), ("whole", "memory, MB")}),
        ("files", {("trainer.py", "open files"), ("whole", "open files")}),
        ("reports", {("whole", "reports, MB")}),
        ("device memory", {("trainer.py", "device memory, MB"), ("device", "device memory, MB")}),
    ],
)
def test_what_grows_is_named(tmp_path, growing, found):
    done, _, grew = watched(tmp_path, growing)
    assert grew == found
    assert done.returncode == 1


def test_another_jobs_device_memory_is_not_counted(tmp_path):
    done, told, grew = watched(tmp_path, "device memory of another job")
    assert grew == set()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["who"] for row in told["rows"] if row["who"].startswith("device")] == ["device 0"]


def series(who, what, numbers):
    """Return samples of a step each."""
    samples = [{"at": at, "processes": {who: {what: number}}} for at, number in enumerate(numbers)]
    return samples, {step: float(step) for step in range(len(numbers))}


@pytest.mark.parametrize(("last", "grew"), [(80, False), (120, True)])
def test_what_is_known_to_grow_may_grow_to_its_bound(last, grew, monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import endurance

    numbers = [60] * 20 + [last] * 20
    (row, _) = endurance.judged(*series("ray::RewardLoopWorker 5", "threads", numbers))
    assert row["grew"] is grew
    assert ("known" in row) is not grew
    (row, _) = endurance.judged(*series("ray::WorkerDict 5", "threads", numbers))
    assert row["grew"]


def test_what_outlives_the_command_is_named_and_ended(tmp_path):
    _, told, _ = watched(tmp_path, "", 60)
    (left,) = told["left behind"]
    assert left.startswith("trainer.py ")
    assert not Path(f"/proc/{left.split()[1]}").exists()


def test_a_limit_ends_the_command(tmp_path):
    done, told, _ = watched(tmp_path, "", 60, "--limit", "2")
    assert told["ended by"] == "--limit 2.0"
    assert told["exit status"] == 0
    assert told["seconds"] < 40, done.stdout
