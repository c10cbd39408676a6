"""verl's offload of activations on a GPU, where it runs on streams of its own: the gradients are those without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from arithmetic import write_model
from processes import result

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

PROGRAM = Path(__file__).parents[1] / "train" / "offloaded_activations.py"
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}


@pytest.mark.parametrize("disabled", [{}, {"VERL_FL_DISABLE": "activations.key"}], ids=["with", "without"])
def test_offloaded_activations_change_no_gradient(tmp_path, record_property, disabled):
    write_model(tmp_path, num_hidden_layers=3)
    for strategy, steps in result(PROGRAM, tmp_path, env={**WITH, **disabled}, timeout=400).items():
        kept, offloaded = ([step["grad_norm"] for step in steps[name]] for name in ("kept", "offloaded"))
        record_property(strategy, [kept, offloaded])
        assert (offloaded == pytest.approx(kept, rel=5e-3)) is not bool(disabled), (strategy, steps)
