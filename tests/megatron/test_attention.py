"""Packed sequences in megatron-core's real attention: Megatron's own numbers of each sequence, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import OVERLAY, result

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")

PROGRAM = Path(__file__).with_name("attention_on_cpu.py")
CASES = (
    "causal",
    "one row",
    "padding_causal",
    "no lengths",
    "no_mask",
    "softmax_scale",
    "layer scaling",
    "window",
    "no window in this layer",
    "off-by-one",
    "learnable",
    "dropout in evaluation",
    "padding",
    "longest with padding",
    "padded batch",
)
REFUSED = {
    "arbitrary": "a mask of type arbitrary",
    "bias": "an attention bias",
    "dropout": "attention_dropout=0.5 in training",
    "context parallel": "context_parallel_size=2",
    "dynamic context parallel": "context_parallel_size=2",
    "padding that is seen": "padding between the sequences",
    "other keys": "other lengths of the keys",
    "no ends": "without cu_seqlens_q",
    "unknown Megatron": "DotProductAttention has no softmax_scale",
    "experts": "the model has experts split over other ranks than the rest",
    "latent": "the model has multi-latent attention",
    "layers context parallel": "set context_parallel_size=1",
}


@pytest.fixture(scope="module")
def found():
    return result(PROGRAM, env={**OVERLAY, "VERL_FL_STRICT": "1"})


@pytest.mark.parametrize("case", CASES)
def test_packed_is_what_each_sequence_gives_alone(found, case):
    assert found["cases"][case] < 1e-5


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(found, case):
    said = found["refused"][case]
    assert said.startswith("MegatronError: ")
    assert REFUSED[case] in said
    assert "install" in said


def test_another_format_has_megatrons_own_error(found):
    assert found["refused"]["bshd"].startswith("AssertionError: Packed sequence is not supported")


def test_without_the_hook_megatron_says_so():
    off = result(PROGRAM, "--one", env={**OVERLAY, "VERL_FL_DISABLE": "attention.megatron"})
    assert off["refused"]["causal"].startswith("AssertionError: Packed sequence is not supported")
