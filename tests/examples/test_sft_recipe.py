"""The recipe of SFT trains on this machine's CPU, in the environment that the tests are in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import arithmetic
import pytest
from processes import clean_environment
from recipes import RECIPES

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)


def test_it_trains_and_says_where_everything_lies(tiny_model, tmp_path):
    arithmetic.write_chats(tmp_path / "chats.parquet", count=64, seed=1)
    variables = {"MODEL": str(tiny_model), "DATA": "chats.parquet", "VAL": "chats.parquet", "OUT": "out", "LR": "3e-3"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", RECIPES / "sft.sh", "trainer.total_epochs=4", "data.train_batch_size=32", "++data.num_workers=0"],
        env=clean_environment({"VERL_FL_DEVICE": "cpu", "PATH": path, **variables}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [float(line.partition("train/loss:")[2].split()[0]) for line in lines(tmp_path) if "train/loss:" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "8"
    table = done.stdout[done.stdout.index("log: ") :]
    assert "trainer/sft_trainer.py" in table
    assert "no problems" in table


def lines(folder: Path) -> list[str]:
    """Return the lines of the run's log."""
    return (folder / "out" / "train.log").read_text().splitlines()
