"""The Triton kernels of log-probs, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from processes import run

BOUND = {"torch.float32": 1e-5, "torch.float16": 6e-4}
"""Largest relative error; the gradient is stored in the logits' type."""


def test_every_variant_of_the_kernels_gives_what_float64_gives(tmp_path):
    environment = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = run(Path(__file__).parent / "interpreted.py", env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["poisoned"] == [[False, True, False]] * 4
    assert all(error < 3e-6 for error in told["labels with a stride"])
    assert len(told["cases"]) == 32
    for case, errors in told["cases"].items():
        assert all(error < BOUND[case.partition(",")[0]] for error in errors), (case, errors)
