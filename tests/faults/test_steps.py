"""Steps that fail under the overlay: verl's or torch's own error comes out, and the training phase is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, run

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("failing steps")  # they share the run

PROGRAM = Path(__file__).with_name("faulty_engine.py")


@pytest.fixture(scope="module")
def steps(tiny_model):
    done = run(PROGRAM, tiny_model, "fail", env={**OVERLAY, "VERL_FL_STRICT": "1"}, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT ")[1])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("out_of_memory", ["OutOfMemoryError", "CUDA out of memory. Tried to allocate"]),
        ("interrupt", ["KeyboardInterrupt", "by the user"]),
    ],
)
def test_error_passes_through_unchanged(steps, name, error):
    assert steps[name]["raised"] == error
    assert steps[name]["same_error"]
    assert steps[name]["last_frame"] == "faulty_engine.py", "the traceback ends where it was raised"
    assert not steps[name]["changed"], "no optimizer step was taken"


@pytest.mark.parametrize("name", ["good", "out_of_memory", "interrupt", "nan", "good_again"])
def test_phase_is_left_once_and_off(steps, name):
    assert steps[name]["events"] == ["entered", "left"]
    assert steps[name]["depth"] == 0
    assert steps[name]["mode"] is None


def test_nan_is_left_to_verl_which_skips_the_update(steps):
    assert steps["nan"]["raised"] is None
    assert not steps["nan"]["changed"]


def test_training_goes_on_after_failures(steps):
    assert steps["good"]["changed"]
    assert steps["good_again"]["changed"]
