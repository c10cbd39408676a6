"""verl's real Megatron engine on the real TransformerEngine-FL: its numbers are those of megatron-core's own layers.

TE_FL_SKIP_CUDA=1 is how TransformerEngine-FL is installed where there is no NVIDIA; its flagos implementations need
flag_gems, and the chip.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import result

from verl_fl_overlay.packages import flagos_builds, installed

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("runs"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not installed("megatron.core"), reason="needs megatron-core"),
    pytest.mark.skipif(not flagos_builds()["TransformerEngine-FL"], reason="needs TransformerEngine-FL"),
    pytest.mark.skipif(not installed("flag_gems"), reason="needs flag_gems"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1", "TE_FL_SKIP_CUDA": "1"}
STEPS = 6
PADDED = ("--engine", json.dumps({"use_remove_padding": False}))
UNFUSED = ("--transformer", json.dumps({"attention_backend": "unfused"}))
MIXED = {"TE_FL_PER_OP": "rmsnorm_fwd=reference;rmsnorm_bwd=reference"}
SIDES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "own layers": (("--without", "transformer_engine"), {}),
    "flagos": ((), {"TE_FL_PREFER": "flagos"}),
    "reference": ((), {"TE_FL_PREFER": "reference"}),
    "mixed": ((), {"TE_FL_PREFER": "flagos", **MIXED}),
    "flagos, padded": ((*PADDED, *UNFUSED), {"TE_FL_PREFER": "flagos"}),
    "reference, padded": ((*PADDED, *UNFUSED), {"TE_FL_PREFER": "reference"}),
}
RAN = {
    "flagos": {
        "rmsnorm_fwd": {"default.flagos"},
        "rmsnorm_bwd": {"default.flagos"},
        "generic_gemm": {"default.flagos"},
    },
    "reference": {key: {"reference.torch"} for key in ("rmsnorm_fwd", "rmsnorm_bwd", "generic_gemm")},
    "mixed": {"rmsnorm_fwd": {"reference.torch"}, "rmsnorm_bwd": {"reference.torch"}},
}


@pytest.fixture(scope="module", params=["lm", "value"])
def runs(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    """Return what gives the numbers of a side; the processes share the GPU, of which they hold little."""

    def run(side: str) -> dict[str, Any]:
        options, environment = SIDES[side]
        env = {**WITH, **environment}
        return result(PROGRAM, tiny_model, "--head", request.param, "--steps", STEPS, *options, env=env, timeout=500)

    with ThreadPoolExecutor() as pool:
        made = {side: pool.submit(run, side) for side in SIDES}
    return lambda side: made[side].result()


def floats(found: dict[str, Any], name: str) -> list[float]:
    return [float.fromhex(step[name]) for step in found["steps"]]


@pytest.mark.parametrize("side", [side for side in SIDES if side != "own layers"])
def test_numbers_are_those_of_megatrons_own_layers(runs: Any, side: str, record_property: Any) -> None:
    for name in ("loss", "grad_norm"):
        ours, theirs = floats(runs(side), name), floats(runs("own layers"), name)
        apart = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        record_property(f"largest relative difference of {name}", apart)
        print(side, name, [round(value, 5) for value in ours], f"{apart:.2e}")
        assert ours == pytest.approx(theirs, rel=3e-2), name  # bf16; a value's loss is a difference of near numbers
    assert floats(runs(side), "loss")[-1] < floats(runs(side), "loss")[0]


@pytest.mark.parametrize("side", RAN)
def test_the_report_tells_which_operators_ran(runs: Any, side: str) -> None:
    told = runs(side)["report"]["features"]["te_fl"]["detail"]["operators that ran"]
    print(side, told)
    assert {name: set(told[name]) for name in RAN[side]} == RAN[side]
