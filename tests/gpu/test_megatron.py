"""verl's real Megatron engine on one GPU: it learns, the phase is on inside only, and the numbers are plain verl's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import PLAIN, run

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
STEPS = 8


def numbers(model: Path, head: str, env: dict[str, str]) -> dict:
    done = run(PROGRAM, model, "--head", head, "--steps", STEPS, env=env, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def losses(result: dict) -> list[float]:
    return [float.fromhex(step["loss"]) for step in result["steps"]]


@pytest.fixture(scope="module", params=["lm", "value"])
def runs(request, tiny_model):
    return {side: numbers(tiny_model, request.param, env) for side, env in (("with", WITH), ("plain", PLAIN))}


def test_loss_falls(runs):
    seen = losses(runs["with"])
    assert len(seen) == STEPS
    assert seen[-1] < seen[0]


def test_phase_is_on_in_every_forward_pass_and_off_after(runs):
    assert len(runs["with"]["inside"]) >= STEPS
    assert all(runs["with"]["inside"])
    assert runs["with"]["after"] is False
    calls = {hook["name"]: hook["calls"] for hook in runs["with"]["report"]["hooks"]}
    assert calls["engine.initialize.megatron"] == 1
    assert calls["engine.train_batch"] == STEPS


def test_numbers_are_plain_verls(runs):
    assert runs["plain"]["report"] is None, "the overlay was not loaded there"
    assert losses(runs["with"]) == pytest.approx(losses(runs["plain"]), rel=2e-2)  # bf16
    values = {side: [float.fromhex(value) for value in result["values"]] for side, result in runs.items()}
    assert values["with"] == pytest.approx(values["plain"], rel=5e-2, abs=5e-2)
