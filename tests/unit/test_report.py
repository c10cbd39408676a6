"""The report: no secret in it, and what failed on the way."""

from __future__ import annotations

import json

import pytest

from verl_fl_overlay import activation, compat, events
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.settings import Settings


@pytest.fixture
def overlay(monkeypatch):
    """Make an overlay with a password in its settings the active one; its hooks are not installed."""
    settings = Settings.from_environment({"FLAGGEMS_DB_URL": "postgresql://me:secret@host/tuning"})
    made = Overlay(settings, compat.select(compat.InstalledVerl(compat.RELEASES[-1], "")))
    monkeypatch.setattr(activation._process, "overlay", made)


def test_the_environment_is_reported_without_passwords(overlay):
    built = activation.report()
    assert built["environment"]["FLAGGEMS_DB_URL"] == "postgresql://***@host/tuning"
    assert "secret" not in json.dumps(built)


def test_a_subscriber_that_failed_is_a_problem(overlay, monkeypatch):
    monkeypatch.setattr(events, "failures", events.Failures())
    assert activation.report()["problems"] == []

    def broken():
        raise ValueError("out of order")

    moment = events.Event("a moment")
    moment.subscribe(broken)
    moment.emit()
    (problem,) = activation.report()["problems"]
    assert problem.startswith("a moment: ")
    assert problem.endswith("broken failed and is skipped: ValueError: out of order")
