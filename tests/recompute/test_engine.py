"""verl's real engines with fewer layers that recompute: how often each layer runs, and the same numbers bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import OVERLAY, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

PROGRAM = Path(__file__).with_name("engine_steps.py")
CASES = ("lm:fsdp2", "lm:fsdp", "value:fsdp2")
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
MICRO_BATCHES = 2
TWO_FIT, ALL_FIT = 540_000, 9_000_000
"""Bytes in which two of four layers, or all, can keep the activations of the longest micro-batch, of 60 tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=4)
    return folder


def steps(model: Path, asked: Any, *options: Any, case: str = "lm:fsdp2", ranks: int = 1) -> dict[str, Any]:
    env = {**OVERLAY, "VERL_FL_RECOMPUTE": str(asked), "OMP_NUM_THREADS": "1"}
    return result(PROGRAM, model, "--case", case, *options, env=env, start=warm, ranks=ranks, timeout=600)


def forwards(found: dict[str, Any]) -> list[list[int]]:
    """Return for each update how often each layer ran in a micro-batch."""
    return [[count / MICRO_BATCHES for count in update["forwards"]] for update in found["updates"]]


def numbers(found: dict[str, Any]) -> list[Any]:
    return [[update["loss"], update["grad_norm"]] for update in found["updates"]] + [found["parameters"]]


@pytest.mark.parametrize("case", CASES)
def test_layers_that_keep_their_activations_run_once_with_the_same_numbers(model, case):
    every, one = (steps(model, asked, case=case) for asked in ("all", 1))
    assert forwards(every) == [[2, 2, 2, 2]] * 2
    assert forwards(one) == [[2, 1, 1, 1]] * 2
    assert numbers(every) == numbers(one)
    assert every["told"] is None
    assert every["calls"]["recompute.forward"] == 0, "all is verl's own, and nothing is hooked for it"
    (told,) = one["told"]["models"].values()
    assert told == {"layers": 4, "recompute": 1}
    assert one["flags after"] == [True] * 4
    assert one["log"] == one["problems"] == []


@pytest.mark.parametrize("options", [("--hf", json.dumps(LORA)), ("--reentrant",)], ids=["lora", "reentrant"])
def test_it_composes(model, options):
    every, none = (steps(model, asked, *options) for asked in ("all", "none"))
    assert forwards(every) == [[2, 2, 2, 2]] * 2
    assert forwards(none) == [[1, 1, 1, 1]] * 2
    assert numbers(every) == numbers(none)


def test_a_number_above_the_layers_stops_the_engine(model):
    env = {**OVERLAY, "VERL_FL_RECOMPUTE": "200"}
    done = warm(PROGRAM, model, env=env, timeout=300)
    assert done.returncode != 0
    assert "SettingsError: VERL_FL_RECOMPUTE=200: Qwen2ForCausalLM has 4 layers that can recompute." in done.stderr


SHARES_FIVE = pytest.mark.xdist_group("five")


@pytest.fixture(scope="module")
def five(model):
    return steps(model, "all", "--updates", 5)


@SHARES_FIVE
def test_auto_takes_what_fits(model, five):
    found = steps(model, "auto", "--updates", 5, "--memory", TWO_FIT)
    assert forwards(found) == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 1, 1], [2, 2, 1, 1]]
    assert numbers(found) == numbers(five)
    assert found["longest"] == 60
    (told,) = found["told"]["models"].values()
    assert (told["layers"], told["recompute"], told["updates"]) == (4, 2, 5)
    assert found["flags after"] == [True] * 4
    assert found["hooks after"] == five["hooks after"]


@SHARES_FIVE
def test_out_of_memory_in_a_forward_is_repeated(model, five):
    found = steps(model, "auto", "--updates", 5, "--memory", ALL_FIT, "--fail", "4:2")
    first, second = [1, 1, 1, 1], [2, 2, 2, 2]
    failed = [1, 1, 1, 0]  # in the attention of the third layer
    repeated = [sum(counts) / MICRO_BATCHES for counts in zip(first, failed, second, strict=True)]
    assert forwards(found) == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1], repeated, [2, 2, 2, 2]]
    assert numbers(found) == numbers(five)
    assert found["log"] == [
        "VERL_FL_RECOMPUTE=auto ran out of memory in Qwen2ForCausalLM; the micro-batch is repeated, and all layers "
        "recompute from now on"
    ]


@pytest.mark.parametrize(("case", "where"), [("lm:fsdp2", "backward"), ("lm:fsdp", "2")])
def test_where_it_cannot_be_repeated_verl_gets_the_error(model, case, where):
    options = ("--updates", 4, "--memory", ALL_FIT, "--fail", f"4:{where}")
    found = steps(model, "auto", *options, case=case)
    assert found["updates"][-1]["raised"] == "no memory, says the test"
    assert found["log"] == ["VERL_FL_RECOMPUTE=auto ran out of memory in training; all layers recompute from now on"]
    assert found["flags"] == [True] * 4


def test_two_ranks_agree_on_what_fits_both(model):
    """The second rank has half of the memory: two layers fit there, and all four on the first one."""
    every = steps(model, "all", "--updates", 4, ranks=2)
    found = steps(model, "auto", "--updates", 4, "--memory", 2 * TWO_FIT * 15 // 14, ranks=2)
    assert forwards(found) == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 1, 1]]
    assert numbers(found) == numbers(every)
