"""Two GPUs of one host, NCCL: FSDP2 and Megatron, data parallel 2 and tensor parallel 2, as plain verl has them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import PLAIN, result

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
STEPS = 8


@pytest.fixture(scope="module", params=[("fsdp2", 1), ("megatron", 1), ("megatron", 2)], ids=["fsdp2", "dp2", "tp2"])
def runs(request, tiny_model):
    strategy, tp = request.param
    if strategy == "megatron":
        pytest.importorskip("megatron.core", reason="needs megatron-core")
        pytest.importorskip("mbridge", reason="needs mbridge")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    engine = json.dumps({"tensor_model_parallel_size": tp} if tp > 1 else {})
    command = [*torchrun, PROGRAM, tiny_model, "--strategy", strategy, "--engine", engine, "--steps", STEPS]
    with ThreadPoolExecutor() as pool:
        sides = {
            side: pool.submit(result, *command, env={**env, "NCCL_NVLS_ENABLE": "0"}, timeout=400)
            for side, env in {"with": WITH, "plain": PLAIN}.items()
        }
    return {side: future.result() for side, future in sides.items()}


def floats(found: dict, name: str) -> list[float]:
    return [float.fromhex(step[name]) for step in found["steps"]]


def test_both_ranks_learn_inside_the_phase(runs, record_property):
    found = runs["with"]
    losses = floats(found, "loss")
    record_property("losses", losses)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert len(found["inside"]["train"]) >= STEPS
    assert all(found["inside"]["train"] + found["inside"]["infer"])
    assert found["after"] is False


def test_numbers_are_plain_verls(runs, record_property):
    assert runs["plain"]["report"] is None, "the overlay was not loaded there"
    for name in ("loss", "grad_norm"):
        ours, theirs = floats(runs["with"], name), floats(runs["plain"], name)
        record_property(
            f"largest relative difference of {name}", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        )
        assert ours == pytest.approx(theirs, rel=2e-2), name  # bf16
