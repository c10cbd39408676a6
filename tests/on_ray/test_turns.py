"""The benchmark of GRPO on a CPU: two rows of main_ppo take turns, and agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from on_ray.test_grpo import missing
from processes import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "grpo.py"
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")


def test_rows_take_turns_with_verls_trainer_and_agree(tmp_path):
    file = tmp_path / "results.json"
    command = (SCRIPT, "--size", "tiny", "--steps", "2", "--turns", "2", "--folder", tmp_path / "run", "--json", file)
    done = run(*command, env={}, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads(file.read_text())
    assert results.keys() == {"padded", "padded overlay"}
    for found in results.values():
        assert [step["counted"] for step in found["steps"]] == [False, True, False, True]
        assert all(step["answers"] > 0 for step in found["steps"])
    assert results["padded overlay"]["reports"] == 7
    assert "reports" not in results["padded"]
