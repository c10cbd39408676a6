"""The benchmark of whole steps runs on a CPU with a tiny model; nothing is said about time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("verl")

from processes import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step.py"


def test_the_tiny_step_is_trained_with_and_without_the_overlay_and_ratios_are_printed(tmp_path):
    file = tmp_path / "result.json"
    done = run(SCRIPT, "--tiny", "--rows", "verl,overlay", "--steps", "3", "--json", file, env={}, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert rows["overlay"]["overlay"]["logprobs"] == {"kernels": {"cpu, bfloat16": "torch"}}
    assert rows["verl"]["overlay"]["logprobs"] == {"kernels": {}}
    steps = {row: rows[row]["tiny"]["steps"] for row in rows}
    assert len(steps["overlay"]) == 3
    for ours, theirs in zip(steps["overlay"], steps["verl"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    assert done.stdout.splitlines()[-1].startswith("overlay")
    assert done.stdout.splitlines()[-1].count("x") == 1  # the ratio to verl; native was not run
