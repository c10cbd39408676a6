"""Empty and masked responses, and lengths at the limits, on a GPU: the overlay's kernels against verl without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from arithmetic import write_model
from faults.odd_batches import CASES
from processes import PLAIN, result

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
    pytest.mark.xdist_group("runs"),
]

PROGRAM = Path(__file__).parents[1] / "faults" / "odd_batches.py"
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    told = {"plain": result(PROGRAM, folder, "--bf16", env=PLAIN, timeout=400)}
    for name, more in {"packed": {}, "chunked": {"VERL_FL_HEAD": "chunked"}}.items():
        told[name] = result(PROGRAM, folder, "--bf16", "--packed", env={**WITH, **more}, timeout=400)
    assert [each["overlay"] for each in told.values()] == [False, True, True]
    return {name: each["told"] for name, each in told.items()}


@pytest.mark.parametrize("row", ["packed", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_verl(runs, row, case):
    """Both compute in bf16, and sum in another order."""
    for name, expected in runs["plain"][case].items():
        found = runs[row][case][name]
        assert found == pytest.approx(expected, rel=0.05, abs=0.05, nan_ok=True), name
