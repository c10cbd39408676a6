"""``verl-fl tune`` on a GPU: a step of verl's engine recorded, timed with FlagGems' real kernels, and run with them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("flag_gems") is None, reason="needs flag_gems"),
]

from processes import result, run  # noqa: E402

from verl_fl_overlay.flaggems.profile import load  # noqa: E402

OVERLAY = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}

CONTEST = """
import json, sys
from dataclasses import replace
from verl_fl_overlay.compat import trial
from verl_fl_overlay.flaggems import library
from verl_fl_overlay.flaggems.tuning import contest

gems, asked = library.load(), []
kernel = next(kernel for kernel in gems.kernels if kernel.key == "embedding")

def embedding(*args, **kwargs):
    asked.append(1)
    return kernel.function(*args, **kwargs)

gems = replace(gems, kernels=(replace(kernel, function=embedding),))
native, ours = contest.Contest(trial.steps(trial.Trial(sys.argv[1], 4, 32, 2)), gems, print).times(["embedding"])
print("RESULT", json.dumps({"native": native, "ours": ours, "asked": len(asked), "rounds": contest.ROUNDS}))
"""


def test_a_step_is_tuned(tiny_model, tmp_path):
    file = tmp_path / "profile.json"
    batch = ("--rows", "4", "--length", "32", "--micro-batch", "2", "--skip", "mm,addmm,bmm", "--out", file)
    done = run("-m", "verl_fl_overlay", "tune", tiny_model, *batch, env=OVERLAY, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    made = load(file)
    assert made.key.chip == torch.cuda.get_device_name()
    rows = {one.key: one for one in made.measurements}
    assert rows["copy_"].calls > rows["_to_copy"].calls > 0  # most copies are made by other operators
    for key in ("copy_", "_to_copy", "add.Tensor", "embedding"):
        assert rows[key].native_ms > 0
        assert rows[key].flaggems_ms > 0
    assert made.step_ms["native"] > 0


def test_whole_steps_run_on_the_kernels_that_are_tried(tiny_model):
    found = result("-c", CONTEST, tiny_model, env=OVERLAY, timeout=300)
    assert found["asked"] == 2 * 4 * found["rounds"]  # two micro-batches, and of four steps three are counted
    assert found["native"] > 0
    assert found["ours"] > 0
