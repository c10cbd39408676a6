"""Two GPUs of one host, NCCL: FSDP2 and Megatron, data parallel 2 and tensor parallel 2, under the overlay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1", "NCCL_NVLS_ENABLE": "0"}
STEPS = 8


@pytest.mark.parametrize(("strategy", "tp"), [("fsdp2", 1), ("megatron", 1), ("megatron", 2)])
def test_two_ranks_learn_inside_the_phase(tiny_model, strategy, tp):
    if strategy == "megatron":
        pytest.importorskip("megatron.core", reason="needs megatron-core")
        pytest.importorskip("mbridge", reason="needs mbridge")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    options = ["--strategy", strategy, "--tp", tp, "--steps", STEPS]
    done = run(*torchrun, PROGRAM, tiny_model, *options, env=WITH, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    seen = [float.fromhex(step["loss"]) for step in result["steps"]]
    assert len(seen) == STEPS
    assert seen[-1] < seen[0]
    assert result["inside"]
    assert all(result["inside"])
    assert result["after"] is False
