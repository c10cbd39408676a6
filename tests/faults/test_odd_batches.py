"""Empty and masked responses, and lengths at the limits: the overlay's numbers are plain verl's, NaN for NaN.

Plain verl pads, as it can on a CPU; the overlay's rows pad, pack, make no logits as a whole, and fuse.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from faults.odd_batches import CASES
from processes import OVERLAY, PLAIN, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("odd batches")  # they share the runs

PROGRAM = Path(__file__).with_name("odd_batches.py")
WITH = {**OVERLAY, "VERL_FL_STRICT": "1"}
ROWS = {
    "padded": (WITH, ()),
    "packed": (WITH, ("--packed",)),
    "chunked": ({**WITH, "VERL_FL_HEAD": "chunked"}, ("--packed",)),
    "fused": (WITH, ("--packed", "--fused")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def plain(model):
    told = result(PROGRAM, model, "--plain", env=PLAIN, start=warm, timeout=400)
    assert not told["overlay"]
    return told["told"]


@pytest.fixture(scope="module", params=ROWS)
def overlay(request, model):
    env, flags = ROWS[request.param]
    told = result(PROGRAM, model, *flags, env=env, start=warm, timeout=400)
    assert told["overlay"]
    assert bool(told["features"]["attention"]["backends"]) is (request.param != "padded")
    if request.param == "chunked":
        assert told["features"]["head"]["models"] == {"Qwen2ForCausalLM": "chunked: VERL_FL_HEAD=chunked"}
    if request.param == "fused":
        assert set(told["replaced"]) == {"adam", "rms_norm", "gated_mlp", "rotary"}
    return told["told"]


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_plain_verl(plain, overlay, case):
    for name, expected in plain[case].items():
        assert overlay[case][name] == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("case", [case for case, rows in CASES.items() if not any(n and on for _, n, on in rows)])
def test_verl_takes_no_step_from_nothing_and_the_weights_stay(plain, overlay, case):
    """verl divides by the number of tokens that count, and its loss is NaN; no weight may become that."""
    assert all(map(math.isnan, plain[case]["loss"]))
    assert overlay[case]["grad_norm"] == [0.0, 0.0]
    assert all(map(math.isfinite, overlay[case]["after"]))
