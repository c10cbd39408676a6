"""Features are started and stopped as the settings ask, describe themselves in the report, and leave nothing behind."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from processes import output

import verl_fl_overlay
from verl_fl_overlay import activation, compat, features, report
from verl_fl_overlay.cli import doctor
from verl_fl_overlay.features import Entry, Features
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.settings import VARIABLES, Settings

PACKAGE = Path(verl_fl_overlay.__file__).parent


class Made(Entry):
    """An entry whose feature is made by hand and not imported."""

    def make(self, settings: Settings) -> Feature:
        return self.home(settings)


def recording(log: list[str], name: str, fails_in: str = "", **told: Any) -> Made:
    class Recorded(Feature):
        def start(self) -> None:
            self.undo.callback(log.append, f"undo {name}")
            log.append(f"start {name}")
            if fails_in == "start":
                raise OSError("no such chip")

        def stop(self) -> None:
            log.append(f"stop {name}")
            super().stop()
            if fails_in == "stop":
                raise OSError(f"{name} does not stop")

        def describe(self) -> dict[str, Any]:
            return told

    return Made(name, f"summary of {name}", Recorded)


def use(monkeypatch: pytest.MonkeyPatch, *given: Entry) -> Features:
    monkeypatch.setattr(features, "FEATURES", {entry.name: entry for entry in given})
    return Features(Settings())


def test_what_is_asked_for_starts_and_stops_in_reverse_order(monkeypatch):
    log: list[str] = []
    off = Made("off", "", recording(log, "off").home, lambda settings: "not asked for")
    made = use(monkeypatch, recording(log, "a"), Entry("passive", "has nothing to start"), off, recording(log, "b"))
    made.start()
    assert log == ["start a", "start b"]
    made.stop()
    assert log == ["start a", "start b", "stop b", "undo b", "stop a", "undo a"]


def test_one_that_cannot_start_is_undone_and_stops_those_before_it(monkeypatch):
    log: list[str] = []
    made = use(monkeypatch, recording(log, "a"), recording(log, "broken", "start"), recording(log, "c"))
    with pytest.raises(OSError, match="no such chip"):
        made.start()
    assert log == ["start a", "start broken", "stop broken", "undo broken", "stop a", "undo a"]
    with pytest.raises(OSError, match="no such chip"):
        made.start()  # again: nothing is taken for started


def test_one_that_cannot_stop_keeps_no_other_from_stopping(monkeypatch):
    log: list[str] = []
    made = use(monkeypatch, recording(log, "a"), recording(log, "b", "stop"), recording(log, "c", "stop"))
    made.start()
    with pytest.raises(OSError, match="b does not stop"):
        made.stop()
    assert [line for line in log if line.startswith("undo")] == ["undo c", "undo b", "undo a"]
    made.stop()  # again: there is nothing left to stop
    assert len(log) == 9


def test_the_hooks_are_off_also_where_a_feature_does_not_stop(monkeypatch):
    use(monkeypatch, recording([], "broken", "stop"))
    overlay = Overlay(Settings(), compat.select(compat.InstalledVerl(compat.RELEASES[-1], "")))
    monkeypatch.setattr(activation._process, "overlay", overlay)
    overlay.start()
    overlay.features.start()  # again: nothing is started twice
    with pytest.raises(OSError, match="broken does not stop"):
        activation.deactivate()
    assert activation.active() is None
    assert {status.state.value for status in overlay.hooks.report()} <= {"removed", "disabled"}


def test_the_report_has_what_a_feature_says_of_itself_only_while_it_is_on(monkeypatch):
    on = recording([], "on", ops=40, vendor="nvidia", failed=[])
    off = Made("off", "s", on.home, lambda settings: "not asked for")
    made = use(monkeypatch, on, off, Entry("silent", "s"))

    class Active:
        settings = Settings()
        features = made

    made.start()
    described = report._features(Active, [])
    assert described["on"]["detail"] == {"ops": 40, "vendor": "nvidia", "failed": []}
    assert "detail" not in described["off"]
    assert "detail" not in described["silent"]


def test_doctor_lays_a_description_out_a_line_an_entry():
    lines = doctor._detail(
        "flaggems", {"version": "5.0.0", "on": ["mm", "mul"], "failed": [], "left out": {"pad": 1}}, True
    )
    assert lines == ["", "flaggems", "  version   5.0.0", "  on        mm, mul", "  left out  pad: 1"]
    assert doctor._detail("flaggems", {"failed": []}, True) == []


def test_every_feature_has_a_home_that_can_be_imported_without_torch():
    program = """
        import sys
        sys.modules["torch"] = None
        from verl_fl_overlay import features
        from verl_fl_overlay.features.feature import Feature
        from verl_fl_overlay.settings import Settings
        made = [entry.make(Settings()) for entry in features.FEATURES.values() if entry.home]
        print(all(isinstance(each, Feature) for each in made), len({type(each) for each in made}) == len(made))"""
    assert output(program, env={}) == "True True"


def test_loading_imports_no_feature_that_is_off():
    program = """
        import sys
        from verl_fl_overlay.features import FEATURES, Features
        from verl_fl_overlay.settings import Settings
        settings = Settings.from_environment({})
        Features(settings).start()
        off = {e.home.partition(":")[0] for e in FEATURES.values() if e.reason_off(settings) and e.home}
        print(sorted(name for name in off if f"verl_fl_overlay.features.{name}" in sys.modules), len(off) > 3)"""
    assert output(program, env={}) == "[] True"


def test_an_unknown_feature_is_left_out_with_the_reason():
    assert features.reason_off("telepathy", Settings()) == "there is no feature telepathy"


@pytest.mark.parametrize("attribute", VARIABLES)
def test_every_setting_has_a_consumer(attribute):
    """A row that nothing reads promises what the overlay does not do."""
    reads = re.compile(rf"\b(settings|self)\.{attribute}\b")
    files = (*PACKAGE.rglob("*.py"), *Path(compat.__file__).parent.rglob("*.py"))
    consumers = [file for file in files if reads.search(file.read_text(encoding="utf-8"))]
    assert consumers, f"no code reads {VARIABLES[attribute].name}"


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch, once imported, is in the second report alone")
def test_nothing_of_one_activation_is_in_the_next(tmp_path):
    """Two activations of a process, of which the first had failures, engines and lists: the second reports neither."""
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl/__init__.py").write_text(f"__version__ = {compat.RELEASES[-1]!r}")
    program = """
        import json
        import verl
        from verl_fl_overlay import activation, events
        from verl_fl_overlay.phase import training
        def broken(*args):
            raise ValueError("of the first run")
        found = []
        for run in (1, 2):
            overlay = activation.activate()
            quiet = activation.report()
            events.engine_built.emit(events.Engine("megatron"))
            if run == 1:
                end = events.engine_initialized.subscribe(broken)
                events.engine_initialized.emit(events.Engine("fsdp"))
                end()
                training.enter("train")  # and verl is stopped before it leaves
            busy = activation.report()
            activation.deactivate()
            found.append([quiet, busy])
        for each in found:
            for built in each:
                built["process"] = None
        questions = [name for name, each in vars(events).items()
                     if isinstance(each, events.Question) and each._answer is not None]
        subscribers = [name for name, each in vars(events).items()
                       if isinstance(each, events.Event) and each._subscribers]
        print(json.dumps([found, questions, subscribers, events.failures.told()]))"""
    env = {
        "PYTHONPATH": str(tmp_path),
        "USE_FLAGCX": "1",
        "USE_FLAGGEMS": "1",
        "VERL_FL_FUSED": "adam",
        "VERL_PLATFORM": "metax",
        "VLLM_FL_OOT_BLACKLIST": "rms_norm",
        "VERL_FL_REPORT_DIR": str(tmp_path / "reports"),
    }
    (first, second), questions, subscribers, failures = json.loads(output(program, env=env))
    assert any("of the first run" in problem for problem in first[1]["problems"])
    assert first[1]["features"]["phase"]["detail"] == {"engines": ["fsdp: no model, no optimizer"]}
    assert second[0] == first[0], "the second activation begins as the first did"
    assert second[1]["problems"] == first[0]["problems"]
    assert (questions, subscribers, failures) == ([], [], {})
