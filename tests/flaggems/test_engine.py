"""verl's real FSDP2 engine on a CPU: the stand-ins are called inside its steps and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("routed")  # they share the native run

PROGRAM = Path(__file__).with_name("routed_engine.py")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def trained(model: Path, **environment: str) -> dict:
    result = warm(PROGRAM, model, env={**OVERLAY, **environment})
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.split("RESULT ")[-1])


@pytest.fixture(scope="module")
def native(tiny_model):
    return trained(tiny_model)


def test_routed_in_train_batch_and_native_outside(tiny_model, native):
    routed = trained(tiny_model, USE_FLAGGEMS="1", TRAINING_FL_FLAGOS_WHITELIST="mul,mm", VERL_FL_STRICT="1")
    assert native["outside"] == routed["outside"] == [True] * 6
    assert all(not step["calls"] for step in native["steps"])
    for step, expected in zip(routed["steps"], native["steps"], strict=True):
        assert step["calls"]["mm"] >= 28  # 2 layers of 4 projections without bias, and the head; backward is twice that
        assert step["calls"]["mul"] > 0
        assert step["grad_norm"] > 0
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    assert routed["values"] == pytest.approx(native["values"], rel=2e-2, abs=2e-2)
    assert routed["detail"]["source"] == "TRAINING_FL_FLAGOS_WHITELIST"
    assert routed["detail"]["operators"] == 2
    assert routed["detail"]["state"] == "native now"


def test_where_with_a_number_keeps_its_gradient_norm(tiny_model, native):
    """https://github.com/flagos-ai/FlagGems/issues/1971: grad_norm was 0 in verl."""
    routed = trained(tiny_model, TRAINING_FL_FLAGGEMS_ENABLE="1")
    assert "where.ScalarOther" in routed["detail"]["left out"]
    assert "where.self" in routed["detail"]["routed"]
    for step, expected in zip(routed["steps"], native["steps"], strict=True):
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)


def test_a_name_of_the_documents_that_flaggems_does_not_have_stops_the_engine_with_an_explanation(tiny_model):
    result = warm(
        PROGRAM, tiny_model, env={**OVERLAY, "USE_FLAGGEMS": "1", "TRAINING_FL_FLAGOS_WHITELIST": "rmsnorm,mul"}
    )
    assert result.returncode == 1
    assert "'rmsnorm': FlagGems calls it rms_norm" in result.stderr
