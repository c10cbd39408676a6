"""Packed sequences equal each sequence alone, or are refused, for the model families that people train."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from processes import OVERLAY, result, warm

from verl_fl_overlay.cli.model_folder import Model

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

from attention.packed_models import build

pytestmark = pytest.mark.xdist_group("families")  # they share the run

PROGRAM = Path(__file__).with_name("packed_models.py")
DEFAULT = "flash_attention_2"
SOUND = (
    *("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"),
    *("qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
WITH_IMAGES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
RIGHT = [f"{family}/{DEFAULT}" for family in SOUND] + [f"{family}/{DEFAULT}/images" for family in WITH_IMAGES]
RIGHT += ["qwen2/sdpa", "qwen3/eager", "mistral/sdpa", f"qwen2/{DEFAULT}/later positions"]
LEAK = [f"{family}/{DEFAULT}" for family in ("qwen3_next", "qwen3_5_text", "lfm2", "bamba")]
WRONG = {
    **dict.fromkeys(["gpt_oss/eager", *LEAK], "mixes packed sequences"),
    "llama4_text/sdpa": "every 8 tokens",
    f"pegasus/{DEFAULT}": "changes with its place in the batch",
}
FUSED_HEAD = {f"qwen2/{DEFAULT}/fused head": "", "gpt_oss/eager/fused head": "mixes packed sequences"}
NEW = {"qwen3_5_text": "5", "pegasus": "5"}
"""Family -> the transformers that runs it with positions first."""


def here(case: str) -> bool:
    return version("transformers") >= NEW.get(case.partition("/")[0], "")


@pytest.fixture(scope="module")
def found():
    cases = ",".join(filter(here, [*RIGHT, *WRONG, *FUSED_HEAD]))
    return result(PROGRAM, cases, env={**OVERLAY, "TRANSFORMERS_VERBOSITY": "error"}, start=warm, timeout=600)


@pytest.mark.parametrize("case", RIGHT)
def test_packed_sequences_equal_each_alone(found, case):
    assert "error" not in found[case], found[case]
    assert found[case]["refused"] == ""
    assert found[case]["logits"] < 1e-5
    assert found[case]["gradients"] < 1e-5


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_mixes_sequences_is_refused(found, case):
    if not here(case):
        pytest.skip(f"transformers {version('transformers')} does not run this family with positions")
    _family, attention = case.split("/")
    assert found[case]["logits"] > 1e-2, "it is wrong, so the refusal is due"
    refused = found[case]["refused"]
    assert WRONG[case] in refused
    assert f"ForCausalLM, {attention} " in refused
    assert "use_remove_padding=False" in refused


@pytest.mark.parametrize("case", sorted({case for case in [*RIGHT, *LEAK] if case.endswith(f"/{DEFAULT}")}))
def test_the_configuration_tells_which_models_mix_sequences(case):
    """``verl-fl config`` prints use_remove_padding=False by it, before a model is built."""
    if not here(case):
        pytest.skip(f"transformers {version('transformers')} does not run this family with positions")
    config = build(case.partition("/")[0], "eager").config.to_dict()
    assert Model(Path(), config).layers_without_attention == (case in LEAK)


@pytest.mark.parametrize("case", FUSED_HEAD)
def test_models_with_verls_fused_head_are_tried_too(found, case):
    refused = found[case]["refused"]
    assert (FUSED_HEAD[case] in refused) if FUSED_HEAD[case] else refused == ""


@pytest.mark.parametrize("family", SOUND)
def test_flash_attention_gets_the_lengths(found, family):
    names = ["cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"]
    assert found[f"{family}/{DEFAULT}"]["lengths"] == names


def test_other_attention_gets_none(found):
    assert found["qwen2/sdpa"]["lengths"] == []


def test_the_report_tells_what_attended(found):
    told = found["report"]["features"]["attention"]["detail"]
    assert "the overlay's functions" in told["flash_attention_2"]
    assert any("soft cap" in problem for problem in told["backends"])
    assert any("sinks" in problem for problem in told["backends"])
    assert all(backend.startswith("SDPA, one sequence at a time") for backend in told["backends"].values())
    assert told["packed models"][f"Qwen2ForCausalLM, {DEFAULT}"] == "keeps them apart"
    assert "mixes" in told["packed models"]["GptOssForCausalLM, eager"]
