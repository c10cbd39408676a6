"""The hooks on verl 0.7's legacy workers, proved on the real workers in a process of their own."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import arithmetic
import pytest
from processes import OVERLAY, result
from sft import without_images

PROGRAM = Path(__file__).with_name("real_workers.py")
TRL = Path(__file__).parents[1] / "trl_stand_in"
STEPS = ["compute_log_prob", "update_policy", "compute_ref_log_prob", "compute_values", "update_critic"]
HOOKS = ["dp_actor.update_policy", "dp_actor.compute_log_prob", "dp_critic.update_critic", "dp_critic.compute_values"]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


pytestmark = pytest.mark.skipif(
    not installed("verl").startswith("0.7."),
    reason=f"legacy workers are in verl 0.7.0 and 0.7.1 only; here is verl {installed('verl') or 'none'}",
)


def results(model: Path, *options: str, **more: str) -> dict:
    env = {**OVERLAY, **without_images(), "VERL_FL_STRICT": "1", **more}
    return result(PROGRAM, model, *options, env=env, timeout=600)


@pytest.fixture(scope="module")
def hooked(tiny_model):
    return results(tiny_model)


@pytest.fixture(scope="module")
def unhooked(tiny_model):
    """Return the same without the hooks on the steps: everything else stays, since a CPU needs it."""
    return results(tiny_model, VERL_FL_DISABLE=",".join(f"legacy.{name}" for name in HOOKS))


@pytest.mark.parametrize("step", STEPS)
def test_phase_is_on_inside_a_step_and_off_after_it(hooked, step):
    call = hooked["calls"][step]
    assert len(call["inside"]) == 2  # two micro-batches
    assert all(call["inside"])
    assert not call["after"]


@pytest.mark.parametrize("step", STEPS)
def test_without_its_hook_the_phase_stays_off(unhooked, step):
    assert unhooked["calls"][step]["inside"] == [False, False]


@pytest.mark.parametrize("step", STEPS)
def test_results_are_bit_equal_with_and_without_hooks(hooked, unhooked, step):
    assert hooked["calls"][step]["result"] == unhooked["calls"][step]["result"]


def test_log_probs_are_those_of_the_model(hooked):
    call = hooked["calls"]["compute_log_prob"]
    got, expected = ([float.fromhex(v) for v in call[name]] for name in ("result", "expected"))
    assert got == pytest.approx(expected, abs=0.05)  # verl's actor runs in bf16


def test_update_trains(hooked):
    assert hooked["calls"]["update_policy"]["change"] > 1e-4


def test_models_are_built_inside_the_phase(hooked):
    assert hooked["report"]["phase"]["counts"] == {"initialize": 3, "eval": 3, "train": 2}
    calls = {hook["name"]: hook["calls"] for hook in hooked["report"]["hooks"]}
    assert calls["legacy.fsdp.build_model_optimizer"] == 2
    assert calls["legacy.fsdp.build_critic_model_optimizer"] == 1


def test_fsdp1_with_all_offloaded_gives_what_fsdp2_gives(tiny_model, hooked):
    found = results(tiny_model, "--fsdp1")
    for step in STEPS:
        values, expected = ([float.fromhex(v) for v in each["calls"][step]["result"]] for each in (found, hooked))
        assert values == pytest.approx(expected, rel=0.03, abs=0.03), step  # they compute in bf16
    assert found["calls"]["update_policy"]["change"] > 1e-4


def test_a_critic_with_trls_head_has_the_configured_attention(tiny_model, tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    words = arithmetic.tokenizer()
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    CohereForCausalLM(CohereConfig(**sizes, **heads)).save_pretrained(tmp_path)  # which has no token classifier
    words.save_pretrained(tmp_path)
    paths = os.pathsep.join((str(TRL), without_images().get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")))
    options = (tiny_model, f"--critic={tmp_path}", "--uneven")
    packed, padded = (
        results(*options, *more, PYTHONPATH=paths)["calls"]["compute_values"] for more in (("--packed",), ())
    )
    assert (packed["attention"], padded["attention"]) == ("flash_attention_2", "sdpa")
    values, expected = ([float.fromhex(value) for value in call["result"]] for call in (packed, padded))
    assert values == pytest.approx(expected, rel=0.03, abs=0.03)  # they compute in bf16


@pytest.fixture(scope="module")
def flagos(tiny_model):
    return results(tiny_model, "--flagos", USE_FLAGGEMS="1", TRAINING_FL_FLAGOS_WHITELIST="mul,mm")


def test_operators_are_routed_in_the_steps_alone(flagos):
    assert flagos["flagos"]["routed"]["mm"] > 100
    assert flagos["flagos"]["routed after"] == 0


def test_a_flaggems_that_somebody_enabled_before_is_left_to_them(flagos):
    """vLLM's plugin does in verl 0.7.0, where vLLM lives in the trainer's process."""
    calls = flagos["flagos"]
    assert "mul" not in calls["routed"]
    assert calls["theirs"]["inside"] > 100
    assert calls["theirs after"] == 1, "still theirs when the training phase is over"
    assert list(flagos["report"]["features"]["flaggems"]["detail"]["held by others"]) == ["mul.Tensor"]


def test_the_models_of_workers_are_fused(flagos):
    replaced = {"gated_mlp": 3 * 2, "adam": 2}
    assert flagos["flagos"]["replaced"] == replaced, "actor, reference and critic, of two layers; one has no optimizer"
    assert flagos["flagos"]["fused"] > 20


@pytest.fixture(scope="module")
def uneven(tiny_model):
    """Return what is computed from prompts of different lengths: packed, which is verl's default, and padded."""
    return results(tiny_model, "--uneven", "--packed"), results(tiny_model, "--uneven")


@pytest.mark.parametrize("step", STEPS)
def test_packed_batches_give_what_padded_ones_give(uneven, step):
    packed, padded = ([float.fromhex(v) for v in each["calls"][step]["result"]] for each in uneven)
    assert packed == pytest.approx(padded, rel=0.03, abs=0.03)  # they compute in bf16


def test_packed_batches_are_attended_by_the_overlay_with_lengths_given_once(uneven):
    packed, padded = uneven
    told = packed["report"]["features"]["attention"]["detail"]
    assert list(told["backends"]) == ["cpu, bfloat16, heads of 16, causal"]
    assert set(told["packed models"].values()) == {"keeps them apart"}
    assert packed["derived lengths"] == 0
    assert padded["report"]["features"]["attention"]["detail"]["backends"] == {}
    calls = {hook["name"]: hook["calls"] for hook in packed["report"]["hooks"]}
    assert calls["attention.lengths_actor"] == 2 * 3
    assert calls["attention.lengths_critic"] == 2 * 2


def test_layers_that_keep_their_activations_change_no_number(tiny_model, hooked):
    found = results(tiny_model, VERL_FL_RECOMPUTE="none")
    told = found["report"]["features"]["recompute"]["detail"]["models"]
    assert list(told.values()) == [{"layers": 2, "recompute": 0}] * 2, "actor and critic; the reference does not train"
    for step in STEPS:
        assert found["calls"][step]["result"] == hooked["calls"][step]["result"]
    calls = {hook["name"]: hook["calls"] for hook in found["report"]["hooks"]}
    assert calls["recompute.forward_actor"] == 2 * 3
    assert calls["recompute.forward_critic"] == 2 * 2
