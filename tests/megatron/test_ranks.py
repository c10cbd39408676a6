"""The benchmark of two GPUs compares Megatron's configurations on two CPU ranks."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import run
from sft import without_images

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ranks.py"
ALIKE = ("dp2", "tp2", "pp2")
NAMES = (*ALIKE, "ep2")


@pytest.mark.skipif(version("verl") != "0.9.1", reason="the benchmark is written for verl 0.9.1")
def test_parallel_ways_have_plain_verls_numbers_and_those_of_each_other(tmp_path):
    file = tmp_path / "result.json"
    command = (SCRIPT, "--tiny", "--steps", "3", "--configurations", ",".join(NAMES), "--json", file)
    done = run(*command, env=without_images(), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(file.read_text())
    first = results["plain"]["dp2"]
    for mode in ("plain", "overlay"):
        for name in ALIKE:
            assert results[mode][name]["loss"] == pytest.approx(first["loss"], rel=1e-4), (mode, name)
            assert results[mode][name]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4), (mode, name)
