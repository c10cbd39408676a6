"""verl's real Megatron engine, one rank, on a CPU that answers for CUDA: the phase, and plain verl's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import OVERLAY, result
from real_engine import refused
from sft import without_images

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")

PROGRAM = Path(__file__).with_name("on_cpu.py")
PHASE = "engine.enter,engine.exit,engine.train_batch,engine.infer_batch,engine.initialize.megatron"
STEPS = 6


def numbers(model: Path, head: str, **more: str) -> dict[str, Any]:
    env = {**OVERLAY, **without_images(), **more}
    return result(PROGRAM, model, "--head", head, "--steps", STEPS, env=env, timeout=400)


@pytest.fixture(scope="module", params=["lm", "value"])
def runs(request, tiny_model):
    """Return the numbers with all hooks, and with those alone that a CPU needs."""
    if refused("megatron", request.param):
        pytest.skip(refused("megatron", request.param))
    return numbers(tiny_model, request.param), numbers(tiny_model, request.param, VERL_FL_DISABLE=PHASE)


def test_it_learns(runs):
    losses = [float.fromhex(step["loss"]) for step in runs[0]["steps"]]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_phase_is_on_in_every_forward_pass_and_off_after(runs):
    hooked, unhooked = runs
    assert [len(hooked["inside"][mode]) for mode in ("train", "infer")] == [2 * STEPS, 2], "two micro-batches"
    assert all(hooked["inside"]["train"] + hooked["inside"]["infer"])
    assert hooked["after"] is False
    assert not any(unhooked["inside"]["train"] + unhooked["inside"]["infer"])
    assert hooked["report"]["phase"]["counts"]["initialize"] == 1


def test_the_hooks_change_no_number(runs):
    hooked, unhooked = runs
    assert hooked["steps"] == unhooked["steps"]
    assert hooked["values"] == unhooked["values"]


@pytest.mark.parametrize("tp", [1, 2], ids=["data parallel", "tensor parallel"])
def test_two_ranks_learn_inside_the_phase(tiny_model, tp):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = {**OVERLAY, **without_images(), "OMP_NUM_THREADS": "1"}
    found = result(*torchrun, PROGRAM, tiny_model, "--steps", 3, "--tp", tp, env=env, timeout=400)
    losses = [float.fromhex(step["loss"]) for step in found["steps"]]
    assert losses[-1] < losses[0]
    assert all(found["inside"]["train"] + found["inside"]["infer"])
    assert found["after"] is False
