"""Checkpoints, weight sync, offloading and reference engines on the CPU, under FSDP1, verl's default, and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
from arithmetic import write_model
from processes import OVERLAY, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("life")  # they share the run

PROGRAM = Path(__file__).with_name("engine_life.py")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lives")
    write_model(folder / "model", num_hidden_layers=3)  # verl offloads the activations of no fewer
    env = {**OVERLAY, "VERL_FL_STRICT": "1"}
    return result(PROGRAM, folder / "model", folder, env=env, start=warm, timeout=600)


@pytest.fixture(params=["fsdp", "fsdp2"])
def of(request, lives):
    return lives[request.param]


def test_a_loaded_checkpoint_and_what_a_rollout_gets_are_what_was_saved(of):
    for name, found in of["lives"].items():
        assert found["weights are those of the checkpoint"], name
        assert found["again"] == found["steps"][1:], name


def test_offloading_changes_no_number(of):
    plain = of["lives"]["plain"]["steps"]
    assert plain[-1]["loss"] < plain[0]["loss"]
    assert {name: found["steps"] for name, found in of["lives"].items()} == dict.fromkeys(of["lives"], plain)


def test_a_reference_gives_what_the_actor_gives(of):
    assert of["log_probs"]["reference"] == of["log_probs"]["actor"]
