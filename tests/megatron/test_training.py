"""verl's real Megatron engine, on a CPU that answers for CUDA, as verl configures it: the phase, and the numbers."""

from __future__ import annotations

import json
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


FLOAT32 = ("--float32", "--steps", 3)
SAME = {
    "padded": {"engine": {"use_remove_padding": False}},
    "recomputed attention": {"transformer": {"recompute_granularity": "selective"}},
    "recomputed layers": {
        "transformer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    },
    "data parallel": {"ranks": 2},
    "tensor and sequence parallel": {"ranks": 2, "engine": {"tensor_model_parallel_size": 2}},
    "pipeline parallel": {"ranks": 2, "engine": {"pipeline_model_parallel_size": 2}},
    "FSDP2": {"options": ("--strategy", "fsdp2"), "engine": {"mixed_precision": {"param_dtype": "fp32"}}},
}
"""What must give the numbers of one rank with packed sequences: another order of the same arithmetic."""


def in_float32(
    model: Path,
    ranks: int = 1,
    engine: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    options: tuple[str, ...] = (),
) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    more = ("--engine", json.dumps(engine or {}), "--transformer", json.dumps(transformer or {}), *options)
    env = {**OVERLAY, **without_images(), "VERL_FL_STRICT": "1", "OMP_NUM_THREADS": "1"}
    return result(*torchrun, PROGRAM, model, *FLOAT32, *more, env=env, timeout=400)


def floats(found: dict[str, Any]) -> dict[str, list[float]]:
    steps = {name: [float.fromhex(step[name]) for step in found["steps"]] for name in ("loss", "grad_norm")}
    return {**steps, "values": [float.fromhex(value) for value in found["values"]]}


@pytest.fixture(scope="module")
def packed(tiny_model):
    """Return what verl's defaults give: packed sequences, one rank."""
    return in_float32(tiny_model)


def test_packed_sequences_go_through_the_overlay(packed):
    calls = {hook["name"]: hook["calls"] for hook in packed["report"]["hooks"]}
    assert calls["attention.megatron"] == 2 * len(packed["inside"]["train"] + packed["inside"]["infer"]), "two layers"
    assert calls["megatron.layers"] == calls["megatron.weight_names"] == 1


@pytest.mark.parametrize("other", SAME)
def test_numbers_are_those_of(packed, tiny_model, other):
    found = in_float32(tiny_model, **SAME[other])
    expected = floats(packed)
    for name, seen in floats(found).items():
        assert len(seen) > 2
        assert seen == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    assert all(found["inside"]["train"] + found["inside"]["infer"])
    assert found["after"] is False


def test_rollout_gets_the_weights_that_were_loaded(tiny_model):
    """Under the names that they have in the checkpoint, those of the norms among them."""
    from safetensors.torch import load_file

    tp2 = {"tensor_model_parallel_size": 2}
    found = in_float32(tiny_model, ranks=2, engine=tp2, options=("--export",))["exported"]
    loaded = {name: float(t.double().abs().sum()) for name, t in load_file(tiny_model / "model.safetensors").items()}
    assert {name: float.fromhex(total) for name, total in found.items()} == pytest.approx(loaded)


def test_experts_on_two_ranks_have_transformers_numbers_and_weights(experts_model):
    """Expert parallel 2, against FSDP2; rollout gets each expert under its own name."""
    from safetensors.torch import load_file

    ep2 = {"expert_model_parallel_size": 2}
    found = in_float32(experts_model, ranks=2, engine=ep2, options=("--export",))
    expected = floats(in_float32(experts_model, **SAME["FSDP2"]))
    for name, seen in floats(found).items():
        assert seen == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    loaded = {name: float(t.double().abs().sum()) for name, t in load_file(experts_model / "model.safetensors").items()}
    assert {name: float.fromhex(total) for name, total in found["exported"].items()} == pytest.approx(loaded)


def test_a_value_head_reads_packed_sequences_as_padded_ones(tiny_model):
    if refused("megatron", "value"):
        pytest.skip(refused("megatron", "value"))
    head = ("--head", "value")
    packed, padded = (in_float32(tiny_model, engine=e, options=head) for e in ({}, {"use_remove_padding": False}))
    for name, seen in floats(packed).items():
        assert seen == pytest.approx(floats(padded)[name], rel=1e-4, abs=1e-4), name


def test_context_parallelism_is_refused_by_name(tiny_model):
    with pytest.raises(AssertionError, match="MegatronError: the model has context_parallel_size=2"):
        in_float32(tiny_model, ranks=2, engine={"context_parallel_size": 2})
