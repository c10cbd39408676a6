"""Value models of which transformers has no token classifier, without flash-attn."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from processes import OVERLAY, before_others, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.xdist_group("value_models"),  # they share the run
    pytest.mark.skipif(
        version("verl") < "0.8", reason="verl 0.7's engines take no trl head; tests/legacy has its critic"
    ),
]

PROGRAM = Path(__file__).with_name("value_models.py")
TRL = Path(__file__).parents[1] / "trl_stand_in"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    env = {**OVERLAY, **before_others(TRL), "VERL_FL_STRICT": "1"}
    return result(PROGRAM, tmp_path_factory.mktemp("models"), env=env, start=warm, timeout=600)


@pytest.mark.parametrize("kind", ["cohere", "qwen2_vl"])
def test_it_trains_with_the_attention_that_is_configured(found, kind):
    packed, padded = found[kind]["packed"], found[kind]["padded"]
    assert (packed["attention"], padded["attention"]) == ("flash_attention_2", "sdpa")
    assert packed["values"] == pytest.approx(padded["values"], rel=0.02, abs=0.02)  # they compute in bf16
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=0.02)
    assert padded["grad_norm"] > 0


def test_the_overlays_functions_attended(found):
    told = found["report"]["features"]["attention"]["detail"]
    assert "cpu, bfloat16, heads of 16, causal" in told["backends"]
    assert len(told["packed models"]) == 2
    assert set(told["packed models"].values()) == {"keeps them apart"}
