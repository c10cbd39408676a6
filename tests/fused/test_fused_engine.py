"""Fused modules in verl's real engines: FSDP1, whose parameters are views, and FSDP2, whose parameters are sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("verl")

from processes import OVERLAY, warm


def test_steps_under_fsdp1_and_fsdp2_are_those_of_the_native_modules(tmp_path):
    from arithmetic import write_model

    write_model(tmp_path)
    done = warm(Path(__file__).parent / "engine_steps.py", tmp_path, env=OVERLAY, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(result) == {"fsdp", "fsdp2"}
    for strategy, told in result.items():
        fused, native = told["fused"], told["native"]
        assert fused["replaced"] == {"adam": 1, "rms_norm": 5, "gated_mlp": 2, "rotary": 1}, strategy
        assert {name for name, count in fused["calls"].items() if count} == {"adam", "norm", "gated", "rotate"}, (
            strategy
        )
        assert native["replaced"] == {}, strategy
        assert not any(native["calls"].values()), strategy
        for one, other in zip(fused["steps"], native["steps"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-2), strategy
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2), strategy
