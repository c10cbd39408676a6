"""verl's default configuration on the CPU, without flash-attn: packed sequences and flash_attention_2."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from processes import OVERLAY, result, warm
from real_engine import THEN

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("packed")  # they share the runs

PROGRAM = Path(__file__).parents[1] / "real_engine.py"
CASES = "lm:fsdp2,lm:fsdp,value:fsdp2"
HEADS = CASES.split(",")
CHECKPOINTED = {"enable_gradient_checkpointing": True}
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def command(model: Path, *options: str, cases: str = CASES, hf: Any = None, engine: Any = None) -> list[Any]:
    fields = ["--hf", json.dumps(hf or {}), "--engine", json.dumps(engine or {})]
    return [PROGRAM, model, "--cases", cases, *fields, *options]


def numbers(model: Path, *options: str, env: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return result(*command(model, *options, **more), env={**OVERLAY, **(env or {})}, start=warm, timeout=600)


LORAS_PADDED = {**LORA, "use_remove_padding": False, "override_config": {"attn_implementation": "sdpa"}}
RUNS = {
    "packed": (("--packed",), {}),
    "padded": ((), {}),
    "checkpointed": (("--packed",), {"cases": "lm:fsdp2", "hf": CHECKPOINTED}),
    "lora": (("--packed",), {"cases": "lm:fsdp2", "hf": LORA}),
    "lora, padded": ((), {"cases": "lm:fsdp2", "hf": LORAS_PADDED}),
}
if version("verl") >= "0.9.1":  # verl pads to a length from there on
    RUNS["to a length"] = (("--packed",), {"cases": "lm:fsdp2", "engine": {"pad_to_length": 64}})


@pytest.fixture(scope="module")
def runs(tiny_model):
    """Return the results of what one process can run."""
    arguments = [command(tiny_model, *options, **more) for options, more in RUNS.values()]
    joined = [argument for program, *each in arguments for argument in (THEN, *each)]
    found = result(arguments[0][0], *joined[1:], env=OVERLAY, start=warm, timeout=600)
    return dict(zip(RUNS, found, strict=True))


@pytest.fixture(scope="module")
def packed(runs):
    return runs["packed"]


@pytest.fixture(scope="module")
def checkpointed(runs):
    return runs["checkpointed"]


def decoded(run: dict[str, Any]) -> list[float]:
    steps = [float.fromhex(step[name]) for step in run["steps"] for name in ("loss", "grad_norm")]
    return steps + [float.fromhex(value) for value in run["values"]]


@pytest.mark.parametrize("case", HEADS)
def test_packed_trains_as_padded(runs, case):
    packed, padded = runs["packed"][case], runs["padded"][case]
    assert decoded(packed) == pytest.approx(decoded(padded), rel=0.02, abs=0.02)  # they compute in bf16
    assert packed != padded, "it was packed"


@pytest.mark.parametrize("case", HEADS)
def test_it_learns(packed, case):
    losses = [float.fromhex(step["loss"]) for step in packed[case]["steps"]]
    assert losses[-1] != losses[0]
    assert losses[-1] < losses[0] or not case.startswith("lm")


def test_the_overlays_functions_attended(packed):
    report = packed["report"]
    told = report["features"]["attention"]["detail"]
    assert list(told["backends"]) == ["cpu, bfloat16, heads of 16, causal"]
    assert set(told["packed models"].values()) == {"keeps them apart"}
    assert report["problems"] == []
    calls = {hook["name"]: hook["calls"] for hook in report["hooks"]}
    assert calls["attention.lengths"] == calls["attention.lengths_on_host"] == 3 * (3 * 2 + 2)


def test_no_layer_derives_the_lengths(packed, checkpointed):
    assert packed["derived lengths"] == checkpointed["derived lengths"] == 0


def test_without_the_hook_each_layer_derives_them(tiny_model, checkpointed):
    env = {"VERL_FL_DISABLE": "attention.lengths"}
    found = numbers(tiny_model, "--packed", cases="lm:fsdp2", hf=CHECKPOINTED, env=env)
    assert found["derived lengths"] == (3 * 2 * 2 + 2) * 2, "micro-batches, twice where recomputed, each of two layers"
    assert found["lm:fsdp2"] == checkpointed["lm:fsdp2"], "the numbers are the same bit for bit"


def test_lora_trains_packed_as_padded(runs):
    found, expected = (runs[name]["lm:fsdp2"] for name in ("lora", "lora, padded"))
    assert decoded(found) == pytest.approx(decoded(expected), rel=0.02, abs=0.02)


@pytest.mark.skipif(Version(version("torch")) < Version("2.13"), reason="gloo exchanges lists of tensors from 2.13 on")
def test_ulysses_on_two_ranks_equals_one(tiny_model, packed):
    options = command(tiny_model, "--packed", cases="lm:fsdp2", engine={"ulysses_sequence_parallel_size": 2})
    found = result(*options, env=OVERLAY, start=warm, ranks=2, timeout=600)
    assert decoded(found["lm:fsdp2"]) == pytest.approx(decoded(packed["lm:fsdp2"]), rel=0.02, abs=0.02)
    assert found["derived lengths"] == 0
    assert set(found["report"]["features"]["attention"]["detail"]["packed models"].values()) == {"keeps them apart"}


def test_ulysses_with_other_attention_is_refused(tiny_model):
    hf = {"override_config": {"attn_implementation": "sdpa"}}
    options = command(tiny_model, "--packed", cases="lm:fsdp2", hf=hf, engine={"ulysses_sequence_parallel_size": 2})
    done = warm(*options, env=OVERLAY, ranks=2, timeout=600)
    assert done.returncode
    assert "PackingError: ulysses_sequence_parallel_size=2 with attn_implementation=sdpa computes wrong" in done.stderr


@pytest.mark.skipif("to a length" not in RUNS, reason="verl pads to a length from 0.9.1 on")
def test_padding_to_a_length_is_a_sequence_of_its_own(runs, packed):
    found = runs["to a length"]
    assert decoded(found["lm:fsdp2"]) == pytest.approx(decoded(packed["lm:fsdp2"]), rel=0.02, abs=0.02)
    assert found["derived lengths"] == 0
