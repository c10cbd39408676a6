"""verl's own SFT trainer with two ranks, as the demo runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, run, warm
from schemas import faults

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

EXAMPLE = Path(__file__).parents[2] / "examples" / "sft.py"


def test_the_unedited_trainer_learns(tmp_path):
    done = run(EXAMPLE, tmp_path, "--steps", "12", env={}, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "\n  ok\n" in done.stdout
    reports = [json.loads(file.read_text()) for file in (tmp_path / "reports").glob("*.json")]
    ranks = {r["process"]["rank"]: r for r in reports if r["phase"]["counts"]}
    assert sorted(ranks) == ["0", "1"]
    for report in ranks.values():
        assert report["phase"]["counts"]["train_batch"] == 12
        assert report["problems"] == []
        assert faults(report, "report") == []


def test_a_report_folder_that_cannot_be_written_does_not_stop_training(tmp_path, tiny_model):
    (tmp_path / "taken").write_text("a file")
    program = Path(__file__).parents[1] / "real_engine.py"
    done = warm(program, tiny_model, env={**OVERLAY, "VERL_FL_REPORT_DIR": str(tmp_path / "taken")}, timeout=600)
    assert "RESULT " in done.stdout, done.stderr[-3000:]
    assert done.stderr.count("cannot be written") == 1
