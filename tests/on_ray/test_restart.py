"""A worker killed in mid-step comes back with the overlay, and trains as on the first day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, before_others, run

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)


@pytest.fixture(scope="module")
def story(tiny_model, tmp_path_factory):
    program = Path(__file__).with_name("restarted_worker.py")
    tests = Path(__file__).parents[1]  # Ray's workers have no script of their own to look beside
    env = {**OVERLAY, **before_others(tests), "RAY_USAGE_STATS_ENABLED": "0", "VERL_FL_STRICT": "1"}
    done = run(program, tiny_model, tmp_path_factory.mktemp("ray"), env=env, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])  # Ray's own log lines may come after it


def test_it_was_killed_inside_the_phase(story):
    assert story["in_step"] == "True"
    assert story["killed"] in {"ActorDiedError", "ActorUnavailableError", "RayActorError"}


def test_the_new_process_has_the_overlay(story):
    assert story["after"]["pid"] != story["before"]["pid"]
    report = story["after"]["report"]
    assert report["phase"] == {**story["before"]["report"]["phase"], "active": False}
    called = {hook["name"] for hook in report["hooks"] if hook["calls"]}
    assert called == {hook["name"] for hook in story["before"]["report"]["hooks"] if hook["calls"]}
    assert "engine.train_batch" in called


def test_it_trains_the_same_numbers(story):
    assert story["after"]["losses"] == story["before"]["losses"]
