"""verl's real Megatron engine on one GPU: it learns, the phase is on inside only, and the numbers are plain verl's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import PLAIN, result

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
pytest.importorskip("megatron.core", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("runs"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
ROUTED = {**WITH, "USE_FLAGGEMS": "1", "VERL_FL_OPS": "mm,mul,copy_"}
SIDES = {"plain": PLAIN, "with": WITH, "routed": ROUTED}
STEPS = 8


@pytest.fixture(scope="module", params=["lm", "value"])
def runs(request, tiny_model):
    """Return what gives the result of a side; the three processes share the GPU, of which they hold little."""
    options = ("--head", request.param, "--steps", STEPS, "--kernels")
    with ThreadPoolExecutor() as pool:
        made = {
            side: pool.submit(result, PROGRAM, tiny_model, *options, env=SIDES[side], timeout=400) for side in SIDES
        }
    return lambda side: made[side].result()


def floats(found: dict, name: str) -> list[float]:
    return [float.fromhex(step[name]) for step in found["steps"]]


@pytest.mark.parametrize("side", ["with", "routed"])
def test_loss_falls(runs, side, record_property):
    seen = floats(runs(side), "loss")
    record_property("losses", seen)
    assert len(seen) == STEPS
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("side", ["with", "routed"])
def test_phase_is_on_in_every_forward_pass_and_off_after(runs, side):
    found = runs(side)
    assert len(found["inside"]["train"]) == 2 * STEPS, "two micro-batches a step"
    assert found["inside"]["infer"]
    assert all(found["inside"]["train"] + found["inside"]["infer"])
    assert found["after"] is False
    calls = {hook["name"]: hook["calls"] for hook in found["report"]["hooks"]}
    assert calls["engine.initialize.megatron"] == 1
    assert calls["engine.train_batch"] == STEPS + 1, "one more under the profiler"


@pytest.mark.parametrize("side", ["with", "routed"])
def test_numbers_are_plain_verls(runs, side, record_property):
    assert runs("plain")["report"] is None, "the overlay was not loaded there"
    for name in ("loss", "grad_norm"):
        ours, theirs = floats(runs(side), name), floats(runs("plain"), name)
        record_property(
            f"largest relative difference of {name}", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        )
        assert ours == pytest.approx(theirs, rel=2e-2), name  # bf16
    ours, theirs = ([float.fromhex(value) for value in runs(s)["values"]] for s in (side, "plain"))
    record_property("largest difference of values", max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    assert ours == pytest.approx(theirs, rel=5e-2, abs=5e-2)


def test_flaggems_runs_inside_and_native_kernels_outside(runs, record_property):
    """By the kernels that the GPU ran; those of torch.compile, which Megatron uses, are in both."""
    native, routed = runs("with")["kernels"], runs("routed")["kernels"]
    record_property("kernels of FlagGems in a step", sorted(set(routed["step"]) - set(native["step"])))
    assert any("mm_kernel" in name for name in routed["step"])
    assert any("mul" in name for name in set(routed["step"]) - set(native["step"]))
    assert not any("mm_kernel" in name for name in native["step"])
    assert routed["outside"]
    assert routed["outside"] == native["outside"] == runs("plain")["kernels"]["outside"]
