"""The benchmark of families: its tiny models run, and both rows have their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("triton")

from processes import PLAIN, run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_tiny_models_of_each_family_take_turns(tmp_path):
    file = tmp_path / "told.json"
    done = run(BENCHMARKS / "families.py", "--rounds", "1", "--json", file, env=PLAIN, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(file.read_text())
    assert list(told) == ["gemma2", "qwen3_moe", "glm4", "cohere2"]
    for family, each in told.items():
        assert {row: len(found["steps ms"]) for row, found in each["rows"].items()} == {"native": 4, "overlay": 4}
        assert each["difference"] == 0, family
    assert done.stdout.count("ratio") == 4
