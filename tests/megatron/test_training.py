"""verl's real Megatron engine, one rank, on a CPU that answers for CUDA: the phase, and plain verl's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, run

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")

PROGRAM = Path(__file__).with_name("on_cpu.py")
PHASE = "engine.enter,engine.exit,engine.train_batch,engine.infer_batch,engine.initialize.megatron"
STEPS = 6


def numbers(model: Path, head: str, **more: str) -> dict:
    done = run(PROGRAM, model, "--head", head, "--steps", STEPS, env={**OVERLAY, **more}, timeout=400)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    return json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])


@pytest.fixture(scope="module", params=["lm", "value"])
def runs(request, tiny_model):
    """Return the numbers with all hooks, and with those alone that a CPU needs."""
    return numbers(tiny_model, request.param), numbers(tiny_model, request.param, VERL_FL_DISABLE=PHASE)


def test_it_learns(runs):
    losses = [float.fromhex(step["loss"]) for step in runs[0]["steps"]]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_phase_is_on_in_every_forward_pass_and_off_after(runs):
    hooked, unhooked = runs
    assert len(hooked["inside"]) == 2 * (STEPS + 1), "two micro-batches a step, and one inference"
    assert all(hooked["inside"])
    assert hooked["after"] is False
    assert not any(unhooked["inside"])
    assert hooked["report"]["phase"]["counts"]["initialize"] == 1


def test_the_hooks_change_no_number(runs):
    hooked, unhooked = runs
    assert hooked["steps"] == unhooked["steps"]
    assert hooked["values"] == unhooked["values"]
