"""Every engine and worker that a release offers, with either head: ``tools/engines.py`` makes a table of the outcomes.

A row of it is a parameter, a column a test, what is not run a skip with its reason.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from processes import OVERLAY, result
from real_engine import refused
from sft import without_images

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

BACKENDS = ("fsdp", "fsdp2", "fsdp_turbo", "megatron", "mindspeed", "veomni", "torchtitan", "automodel")
ROWS = [f"{backend} {head}" for backend in (*BACKENDS, "legacy fsdp", "legacy megatron") for head in ("lm", "value")]
TESTS = Path(__file__).parents[1]
LEGACY = {
    "lm": {"train": ("update_policy",), "infer": ("compute_log_prob", "compute_ref_log_prob")},
    "value": {"train": ("update_critic",), "infer": ("compute_values",)},
}
STEPS = 3

every_row = pytest.mark.parametrize("row", ROWS)


def environment() -> dict[str, str]:
    return {
        **(OVERLAY if not torch.cuda.is_available() else {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}),
        **without_images(),
        "VERL_FL_STRICT": "1",
    }


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    found = result(TESTS / "engines" / "real_classes.py", env=environment())
    assert set(found) <= set(ROWS), "verl offers an engine that has no row here"
    return found


@pytest.fixture
def methods(classes, row) -> dict[str, bool]:
    """Return which methods of the row's class are hooked."""
    if row not in classes:
        pytest.skip(f"not in verl {version('verl')}")
    if "needs" in classes[row]:
        pytest.skip(f"needs {classes[row]['needs']}")
    return classes[row]


@pytest.fixture(scope="module")
def inside(tiny_model) -> Any:
    """Return a function of a row that trains and infers with it: whether the phase was on in each forward pass."""

    @functools.cache
    def legacy() -> dict[str, Any]:
        return result(TESTS / "legacy" / "real_workers.py", tiny_model, env=environment(), timeout=600)["calls"]

    @functools.cache
    def of(row: str) -> dict[str, list[bool]]:
        backend, _, head = row.rpartition(" ")
        if backend == "legacy fsdp":
            if torch.cuda.is_available():
                pytest.skip("its test is for a CPU")
            calls = legacy()
            return {
                mode: [on for step in steps for on in [*calls[step]["inside"], not calls[step]["after"]]]
                for mode, steps in LEGACY[head].items()
            }
        if backend not in ("fsdp", "fsdp2", "megatron"):
            here = backend == "legacy megatron" or find_spec(backend)
            pytest.skip("no program of ours runs it" if here else f"needs {backend}")
        if refused(backend, head):
            pytest.skip(refused(backend, head))
        program = TESTS / "gpu" / "megatron_engine.py"
        if backend == "megatron" and not torch.cuda.is_available():
            program = TESTS / "megatron" / "on_cpu.py"
        options = ("--strategy", backend, "--head", head, "--steps", STEPS)
        found = result(program, tiny_model, *options, env=environment(), timeout=400)
        assert len(found["steps"]) == STEPS
        return {mode: [*seen, not found["after"]] for mode, seen in found["inside"].items()}

    return of


@every_row
def test_hooks_on_the_real_class(row, methods):
    assert methods
    assert all(methods.values()), methods


@every_row
def test_phase_on_in_training(row, methods, inside):
    seen = inside(row)["train"]
    assert len(seen) > 1
    assert all(seen)


@every_row
def test_phase_on_in_inference(row, methods, inside):
    seen = inside(row)["infer"]
    assert len(seen) > 1
    assert all(seen)
