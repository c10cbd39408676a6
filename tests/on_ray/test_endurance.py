"""Many steps of verl's main_ppo: no process grows in memory, open files or threads, and the reports do not either.

ENDURANCE_STEPS=300 pytest tests/on_ray/test_endurance.py takes twenty minutes; without it 40 steps are trained.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from on_ray.test_grpo import missing
from processes import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")

ROOT = Path(__file__).resolve().parents[2]
STEPS = int(os.environ.get("ENDURANCE_STEPS", "40"))


def test_nothing_grows_with_the_steps(tmp_path):
    found = tmp_path / "endurance.json"
    watch = [ROOT / "benchmarks" / "endurance.py", "--json", found, "--reports", tmp_path / "reports", "--every", 2]
    train = [Path(__file__).with_name("ppo.py"), tmp_path, STEPS]
    done = run(*watch, "--", sys.executable, *train, env={}, timeout=900 + 10 * STEPS)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    told = json.loads(found.read_text())
    assert told["steps"] == STEPS
    assert told["left behind"] == []
    judged = {(row["who"].split()[0], row["what"]) for row in told["rows"]}
    roles = {"ray::WorkerDict", "ray::Server", "ray::TaskRunnerV1", "ray::AgentLoopWorkerTQ", "raylet"}
    assert {(role, what) for role in roles for what in ("memory, MB", "open files", "threads")} <= judged
    assert {("whole", "reports, files"), ("whole", "reports, MB"), ("whole", "processes")} <= judged
