"""The weights that rollout gets after updates are those that were trained, whichever feature is on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from arithmetic import write_model
from processes import OVERLAY, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

PROGRAM = Path(__file__).with_name("synced_weights.py")
ROUTED = {"USE_FLAGGEMS": "1", "TRAINING_FL_FLAGOS_WHITELIST": "mul,mm"}
CHUNKED = {"VERL_FL_HEAD": "chunked"}
CASES = {
    "nothing": (("fsdp2",), {}),
    "all": (("fsdp2", "--packed", "--fused"), {**ROUTED, **CHUNKED}),
    "all, fsdp1": (("fsdp", "--packed", "--fused"), {**ROUTED, **CHUNKED}),
    "all, adapters merged": (("fsdp2", "--packed", "--fused", "--lora"), {**ROUTED, **CHUNKED}),
    "adapters merged, some in FSDP's root": (("fsdp2", "--lora", "--outside"), {}),
}
FUSED = {"adam": 1, "rms_norm": 5, "gated_mlp": 2, "rotary": 1}


@pytest.mark.parametrize("case", CASES)
def test_rollout_gets_what_was_trained(tiny_model, case):
    options, environment = CASES[case]
    if "--lora" in options and version("verl") == "0.7.0":
        pytest.skip("verl 0.7.0 cannot merge adapters")
    told = result(PROGRAM, tiny_model, *options, env={**OVERLAY, **environment}, start=warm)
    assert told["replaced"] == (FUSED if "--fused" in options else {})
    assert (told["operators"] > 500) == bool(environment), "FlagGems' operators trained"
    assert told["native"], "and none of them ran while the weights were given"
    head = told["features"]["head"]["models"]
    assert head == ({"Qwen2ForCausalLM": "chunked: VERL_FL_HEAD=chunked"} if environment else {})
    assert bool(told["features"]["attention"]["packed models"]) == ("--packed" in options)
    assert len(told["names"]) == 27, "and transformers' own model took them all"
    if "--lora" in options:
        assert told["moved"] == [name for name in told["names"] if name.endswith("_proj.weight")]
    else:
        assert told["moved"] == told["as trained"] == told["names"]
    # The engine computes in bf16.
    assert told["of the engine"] == pytest.approx(told["of the weights"], rel=0, abs=0.01)
    pairs = zip(told["of the engine"], told["of those before"], strict=True)
    assert max(abs(one - other) for one, other in pairs) > 0.1


@pytest.mark.parametrize(
    "options", [("fsdp2",), ("fsdp2", "--layered"), ("fsdp",), ("fsdp", "--layered")], ids=" ".join
)
def test_rollout_gets_all_adapters_that_were_trained(tiny_model, options):
    if options == ("fsdp", "--layered") and version("verl") >= "0.9":
        pytest.skip("verl 0.9 itself raises on one rank")
    told = result(PROGRAM.with_name("synced_adapters.py"), tiny_model, *options, env=OVERLAY, start=warm)
    assert told == {"given": 28, "as trained": True}


def test_adapters_that_layered_summon_leaves_out_are_an_error(tiny_model):
    done = warm(PROGRAM.with_name("synced_adapters.py"), tiny_model, "fsdp2", "--layered", "--outside", env=OVERLAY)
    assert done.returncode
    given, left, first = (6, 8, "self_attn.k_proj") if version("verl") >= "0.9" else (0, 14, "mlp.down_proj")
    assert f"AdapterError: verl's layered_summon gives rollout the adapters of {given} modules and " in done.stderr
    assert f"leaves out those of {left} (base_model.model.model.layers.0.{first} ...)" in done.stderr


def test_merged_adapters_of_embeddings_that_share_the_heads_weight_are_an_error(tmp_path):
    """Under FSDP2: FSDP1 refuses adapters there itself, and verl's FSDP2 engine does where the head has its own."""
    if version("verl") == "0.7.0":
        pytest.skip("verl 0.7.0 cannot merge adapters")
    write_model(tmp_path, tie_word_embeddings=True)
    done = warm(PROGRAM.with_name("synced_adapters.py"), tmp_path, "fsdp2", "--embeddings", env=OVERLAY)
    said = (
        "AdapterError: the model's head shares the weight of its embeddings, and an adapter is on the embeddings alone"
    )
    assert done.returncode
    assert said in done.stderr, done.stderr[-3000:]
