"""A rollout engine that is missing or does not fit is told on the driver, before Ray starts."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import OVERLAY, result, warm

from verl_fl_overlay.cli.install_hint import ADDITIONS

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.xdist_group("rollout drivers"),  # they share the runs
    pytest.mark.skipif(bool(find_spec("vllm") or find_spec("sglang")), reason="needs an environment without engines"),
]

PROGRAM = Path(__file__).with_name("rollout_drivers.py")


def drivers(*options, **environment):
    env = {**OVERLAY, "RAY_TMPDIR": "/nowhere", **environment}
    told = result(PROGRAM, *options, env=env, start=warm)
    assert not told["Ray was started"]
    return told["cases"]


@pytest.fixture(scope="module")
def told():
    return drivers()


@pytest.mark.parametrize(
    ("case", "asked", "engine"),
    [
        ("vllm", "actor_rollout_ref.rollout.name=vllm", "vllm"),
        ("verl's defaults", "actor_rollout_ref.rollout.name=vllm", "vllm"),
        ("sglang", "actor_rollout_ref.rollout.name=sglang", "sglang"),
        ("trtllm", "actor_rollout_ref.rollout.name=trtllm", "tensorrt_llm"),
        ("reward model", "reward.reward_model.rollout.name=vllm", "vllm"),
        ("teacher", "distillation.teacher_models.one.inference.name=sglang", "sglang"),
    ],
)
def test_a_missing_engine_ends_the_driver(told, case, asked, engine):
    raised = told[case]["raised"]
    assert raised.startswith(f"OverlayError: {asked}, and {engine} is not installed for {sys.executable}")
    assert (f"verl-fl install-hint {engine}" in raised) == (engine in ADDITIONS), "it takes what it knows alone"
    assert "VERL_FL_DISABLE=rollout.engine" in raised


@pytest.mark.parametrize(
    "case",
    [
        "RAY_ADDRESS",
        "RAY_RUNTIME_ENV_HOOK",
        "address",
        "a cluster's folder",
        "Ray client",
        "pip",
        "PYTHONPATH",
        "both on a cluster",
    ],
)
def test_where_the_workers_may_have_it_the_driver_warns_and_goes_on(told, case):
    assert told[case]["raised"] == ""
    (said,) = told[case]["said"]
    assert "vllm is not installed for" in said
    assert "has to be on the nodes of the Ray cluster" in said


@pytest.mark.parametrize("case", ["somebody's own", "reward model that is off", "teacher that is off", "SFT"])
def test_others_go_on_in_silence(told, case):
    assert told[case] == {"raised": "", "said": []}


def test_left_out_by_name_it_says_nothing():
    assert all(case == {"raised": "", "said": []} for case in drivers(VERL_FL_DISABLE="rollout.engine").values())


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_version_that_verl_does_not_take_is_told(strict):
    cases = drivers("--vllm", "0.5.4", VERL_FL_STRICT=strict)
    words = ("actor_rollout_ref.rollout.name=vllm", "asks for vllm", "vllm 0.5.4 is here")
    told = cases["vllm"]["raised"] if strict == "1" else " ".join(cases["vllm"]["said"])
    assert all(word in told for word in words), cases["vllm"]
    assert bool(cases["vllm"]["raised"]) == (strict == "1")
    assert cases["somebody's own"] == {"raised": "", "said": []}
    for case in ("pip", "address"):
        assert cases[case]["raised"] == "", "the workers may have another version"
        assert all(word in " ".join(cases[case]["said"]) for word in words)


def a_version_that_verl_takes():
    """Return one that verl's requirements name, or any if they name none."""
    asked = [Requirement(text) for text in metadata.requires("verl") or ()]
    ranges = [one.specifier for one in asked if one.name == "vllm"]
    return next(v for v in ("0.8.5", "0.12.0", "0.24.0") if all(each.contains(v) for each in ranges))


@pytest.mark.parametrize(("other", "ends"), [("torch", True), ("packaging", False)])
def test_under_strict_only_versions_of_the_stack_end_the_driver(other, ends):
    """vLLM bounds packages that it only builds with, and an image that is newer there runs."""
    cases = drivers("--vllm", a_version_that_verl_takes(), f"{other}<0.1", VERL_FL_STRICT="1")
    told = cases["vllm"]["raised"] if ends else " ".join(cases["vllm"]["said"])
    assert f"asks for {other}<0.1, and {other} " in told, cases["vllm"]
    assert bool(cases["vllm"]["raised"]) == ends
