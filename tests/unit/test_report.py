"""The report: no secret in it, and what failed on the way."""

from __future__ import annotations

import importlib
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


def test_a_component_that_raises_on_import_is_a_line_and_its_traceback_is_for_debugging(monkeypatch, caplog, tmp_path):
    (tmp_path / "broken_component.py").write_text("raise OSError('libx.so:\\n  cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(events, "failures", events.Failures())
    moment = events.Event("a moment")
    moment.subscribe(lambda: importlib.import_module("broken_component"))
    for level, tracebacks in (("INFO", 0), ("DEBUG", 1)):
        events.failures.begin(strict=False)
        caplog.clear()
        with caplog.at_level(level, logger="verl_fl_overlay"):
            moment.emit()
        (line,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert line.getMessage().endswith("OSError: libx.so: cannot open shared object file")
        assert line.exc_info is None
        assert sum(bool(record.exc_info) for record in caplog.records) == tracebacks
