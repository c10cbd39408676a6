"""``check`` before, ``doctor`` beside and the process itself say the same of the same tree, hook by hook."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import verl_trees
from drift import copies

from verl_fl_overlay import activation
from verl_fl_overlay.cli import doctor
from verl_fl_overlay.compat.release import check
from verl_fl_overlay.compat.release.check import Outcome
from verl_fl_overlay.hooks import State

ENGINE = "verl/workers/engine"
PLATFORM = "verl/plugin/platform"
MORE_ABSTRACT = "class PlatformBase(abc.ABC):\n    @abc.abstractmethod\n    def more(self): ...\n"


@dataclass(frozen=True)
class Change:
    """Files with the old and the new text in them (None: the file is gone), and the outcomes that follow from it."""

    edits: dict[str, tuple[str, str] | None] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    release: str = ""
    """The release to make it in; "" for the newest that is here."""


CHANGES = {
    "nothing": Change(),
    "an engine's module gone": Change(
        {f"{ENGINE}/veomni/transformer_impl.py": None},
        {"engine.initialize.veomni": Outcome.WITHOUT},
    ),
    "a required module gone": Change(
        {f"{ENGINE}/fsdp/transformer_impl.py": None},
        {"engine.initialize.fsdp": Outcome.REFUSED, "logprobs.fsdp": Outcome.WITHOUT},
    ),
    "an optional module gone": Change(
        {"verl/utils/model.py": None},
        {"attention.value_model": Outcome.WITHOUT},
    ),
    "a legacy module gone": Change(
        {"verl/workers/actor/dp_actor.py": None},
        {
            "legacy.dp_actor.update_policy": Outcome.REFUSED,
            "legacy.dp_actor.compute_log_prob": Outcome.REFUSED,
            "logprobs.legacy_actor": Outcome.WITHOUT,
        },
        release="0.7.1",
    ),
    "a required target renamed": Change(
        {f"{ENGINE}/base.py": ("def train_batch(", "def train_one_batch(")},
        {"engine.train_batch": Outcome.REFUSED},
    ),
    "an optional target renamed": Change(
        {"verl/utils/model.py": ("def load_valuehead_model(", "def load_value_model(")},
        {"attention.value_model": Outcome.WITHOUT},
    ),
    "a required target's parameters": Change(
        {f"{ENGINE}/base.py": ("def infer_batch(self, ", "def infer_batch(self, more, ")},
        {"engine.infer_batch": Outcome.REFUSED},
    ),
    "an optional target's parameters": Change(
        {"verl/utils/model.py": ("def load_valuehead_model(local_path,", "def load_valuehead_model(folder,")},
        {"attention.value_model": Outcome.WITHOUT},
    ),
    "an attribute of instances renamed": Change(
        {f"{ENGINE}/base.py": ("self.mode = mode", "self.mode_renamed = mode")},
        {"engine.enter": Outcome.WITHOUT},
    ),
    "a reliance in the same module renamed": Change(
        {f"{ENGINE}/base.py": ("_engines", "_engines_renamed")},
        {"chip.engine_class": Outcome.REFUSED, "engine.new": Outcome.WORKS},
    ),
    "a class with one more abstract method": Change(
        {f"{PLATFORM}/platform_base.py": ("class PlatformBase(abc.ABC):", MORE_ABSTRACT)},
        {"chip.platform": Outcome.REFUSED},
        release="0.9.1",
    ),
    "a body": Change(
        {f"{ENGINE}/base.py": ("engine_cls(*args, **kwargs)", "engine_cls(*args, **kwargs, more=1)")},
        {"engine.new": Outcome.REVIEW},
    ),
}


@pytest.fixture(params=CHANGES)
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, Outcome]]:
    """Return a tree with the change in it, and the outcomes that differ from WORKS by it."""
    change = CHANGES[request.param]
    tree = verl_trees.tree(change.release) if change.release else verl_trees.newest()
    files = copies.hooked_files(tree)
    for path, edit in change.edits.items():
        text = files.pop(path)
        if edit is not None:
            assert edit[0] in text
            files[path] = text.replace(*edit)
    return copies.write({**files, "verl/__init__.py": f"__version__ = {tree.version!r}"}, tmp_path), change.outcomes


def test_check_doctor_and_the_process_agree(
    changed: tuple[Any, dict[str, Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, outcomes = changed
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_fl_overlay")
    monkeypatch.setenv("VERL_FL_DEVICE", "cpu")  # so that the hooks for other chips have a part, too
    found = check.check(tree)
    findings = {finding.hook.name: finding for finding in found.findings}
    for name, outcome in outcomes.items():
        assert findings[name].outcome is outcome
    with copies.imported(tree.folder, "nothing"):  # a placeholder; doctor imports verl itself
        result, usable = doctor.examine()
        overlay = activation.active()
        refusal = overlay.hooks.refusal if overlay else result["problems"][0]
        activation.deactivate()

    refused = [name for name, finding in findings.items() if finding.fatal]
    assert found.holds == usable == (refusal is None) == (not refused), result["problems"]
    if not usable:
        assert any(f"hook {name!r} cannot be put on" in str(refusal) for name in refused)
        assert result["problems"][0] == str(refusal)
        assert found.verdict.startswith("verl-fl-overlay will refuse to load")
    for hook in result["hooks"]:
        finding = findings[hook["name"]]
        assert hook["outcome"] == finding.outcome.value
        if hook["state"] == State.DISABLED.value and finding.outcome is not Outcome.WITHOUT:
            assert hook["detail"], "left out by the settings"
        elif finding.fatal:
            named = (f"hook {hook['name']!r} ", f"hook {hook['name']}:")  # by the process, and by doctor
            assert any(problem.startswith(named) for problem in result["problems"])
        elif finding.outcome is Outcome.WITHOUT and hook["state"] == State.INSTALLED.value:
            assert all(c.late for c in finding.reliances if c.breaks)
            assert hook["detail"] == finding.meaning
        elif finding.outcome is Outcome.WITHOUT:
            assert hook["state"] in (State.FAILED.value, State.DISABLED.value)
            assert hook["detail"]
        elif usable and finding.target.against:  # in verl
            assert hook["state"] == State.INSTALLED.value, hook
