"""Activations that verl offloads come back as they were, also where layers keep them for their backward."""

from __future__ import annotations

from pathlib import Path

import pytest
from arithmetic import write_model
from processes import OVERLAY, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

PROGRAM = Path(__file__).with_name("offloaded_activations.py")


@pytest.mark.parametrize("disabled", ["", ",activations.key"])
def test_offloaded_activations_change_no_gradient(tmp_path, disabled):
    write_model(tmp_path, num_hidden_layers=3)  # verl offloads the activations of no fewer
    environment = {**OVERLAY, "VERL_FL_DISABLE": f"cpu.activation_offload{disabled}"}
    for strategy, steps in result(PROGRAM, tmp_path, env=environment, start=warm).items():
        assert (steps["offloaded"] == steps["kept"]) is not bool(disabled), (strategy, steps)
