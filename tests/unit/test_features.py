"""Features are started and stopped as the settings ask, and describe themselves in the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from verl_fl_overlay import activation, features, report
from verl_fl_overlay.cli import doctor
from verl_fl_overlay.features import Feature
from verl_fl_overlay.settings import Settings


def recording(name: str, log: list[str], **fields: Any) -> Feature:
    def start(settings: Settings) -> Callable[[], None]:
        log.append(f"start {name}")
        return lambda: log.append(f"stop {name}")

    return Feature(name, f"summary of {name}", start=start, **fields)


def use(monkeypatch: pytest.MonkeyPatch, *given: Feature) -> None:
    monkeypatch.setattr(features, "FEATURES", {feature.name: feature for feature in given})


def test_what_is_asked_for_starts_and_stops_in_reverse_order(monkeypatch):
    log: list[str] = []
    off = recording("off", log, reason_off=lambda settings: "not asked for")
    use(monkeypatch, recording("a", log), Feature("passive", "has nothing to start"), off, recording("b", log))
    stop = features.start(Settings())
    assert log == ["start a", "start b"]
    stop()
    assert log == ["start a", "start b", "stop b", "stop a"]


def test_one_that_cannot_start_stops_those_before_it(monkeypatch):
    log: list[str] = []

    def broken(settings: Settings) -> Callable[[], None]:
        raise OSError("no such chip")

    use(monkeypatch, recording("a", log), Feature("broken", "", start=broken), recording("c", log))
    with pytest.raises(OSError, match="no such chip"):
        features.start(Settings())
    assert log == ["start a", "stop a"]


def test_the_report_has_what_a_feature_says_of_itself_only_while_it_is_on(monkeypatch):
    class Active:
        settings = Settings()

    monkeypatch.setattr(activation, "_active", Active)
    on = Feature("on", "s", describe=lambda: {"ops": 40, "vendor": "nvidia", "failed": []})
    off = Feature("off", "s", lambda settings: "not asked for", describe=lambda: {"ops": 1})
    use(monkeypatch, on, off, Feature("silent", "s"))
    described = report._features([])
    assert described["on"]["detail"] == {"ops": 40, "vendor": "nvidia", "failed": []}
    assert "detail" not in described["off"]
    assert "detail" not in described["silent"]


def test_doctor_lays_a_description_out_a_line_an_entry():
    lines = doctor._detail("flaggems", {"version": "5.0.0", "on": ["mm", "mul"], "failed": [], "left out": {"pad": 1}})
    assert lines == ["", "flaggems", "  version   5.0.0", "  on        mm, mul", "  left out  pad: 1"]
    assert doctor._detail("flaggems", {"failed": []}) == []
