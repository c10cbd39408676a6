"""Real engines on the CPU: the same numbers as plain verl, bit for bit, and learning."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from processes import OVERLAY, PLAIN, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("engines")  # they share the runs

PROGRAM = Path(__file__).parents[1] / "real_engine.py"
CASES = ["lm:fsdp2", "value:fsdp2", "lm:fsdp", "value:fsdp"]


def numbers(model: Path, cases: list[str], env: dict[str, str], *more: str) -> dict[str, Any]:
    done = warm(PROGRAM, model, "--cases", ",".join(cases), *more, env=env, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-6000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def with_overlay(tiny_model) -> dict[str, Any]:
    return numbers(tiny_model, CASES, OVERLAY)


@pytest.mark.parametrize("case", CASES)
def test_trains(with_overlay, case):
    losses = [float.fromhex(step["loss"]) for step in with_overlay[case]["steps"]]
    norms = [float.fromhex(step["grad_norm"]) for step in with_overlay[case]["steps"]]
    assert losses[-1] != losses[0]
    assert all(norm > 0 for norm in norms), "no gradient was cut"
    if case.startswith("lm"):
        assert losses[-1] < losses[0]


def plain_cases() -> list[str]:
    """Return what this verl can train on a CPU without the overlay: FSDP2, and value heads only before 0.8.0."""
    return ["lm:fsdp2", "value:fsdp2"] if version("verl") < "0.8" else ["lm:fsdp2"]


@pytest.fixture(scope="module")
def plain(tiny_model) -> dict[str, Any]:
    found = numbers(tiny_model, plain_cases(), PLAIN, "--plain")
    assert "report" not in found, "the overlay was not loaded there"
    return found


def test_numbers_are_plain_verls_bit_for_bit(plain, tiny_model):
    """Only the log-probs are computed otherwise where flash-attn is missing; with verl's own all else is the same."""
    same = numbers(tiny_model, plain_cases(), {**OVERLAY, "VERL_FL_DISABLE": "logprobs.fsdp,entropy.fsdp"})
    for case in plain_cases():
        assert same[case] == plain[case], case


def test_log_probs_differ_from_plain_verls_by_its_rounding_alone(plain, with_overlay):
    """verl rounds them to bf16: at most 2**-8 of their size."""
    theirs, ours = ([float.fromhex(v) for v in found["lm:fsdp2"]["values"]] for found in (plain, with_overlay))
    assert theirs != ours, "ours are fp32"
    # Three steps of training went before, so the weights differ by what that rounding made of the gradients.
    bound = 2**-8 * max(map(abs, theirs)) * 2
    assert all(abs(a - b) < bound for a, b in zip(theirs, ours, strict=True))


def test_every_required_hook_was_called(with_overlay):
    hooks = {h["name"]: h for h in with_overlay["report"]["hooks"]}
    idle = [n for n, h in hooks.items() if h["required"] and h["state"] == "installed" and not h["calls"]]
    # The engines alone do not ask for memory figures, nor for the configured device; the trainer does.  There is no
    # LoRA here.
    assert set(idle) <= {"cpu.device_module", "chip.configured_device", "engine.merged_adapters"}
    assert hooks["engine.new"]["calls"] == len(CASES)
    assert hooks["engine.initialize.fsdp"]["calls"] == len(CASES)
    assert hooks["engine.train_batch"]["calls"] == 3 * len(CASES)
    assert with_overlay["report"]["phase"] == {
        "active": False,
        "counts": {"initialize": 4, "train": 12, "train_batch": 12, "eval": 4, "infer_batch": 4},
    }
