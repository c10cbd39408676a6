"""The command ``verl-fl check``: exit status, verdict, JSON, and that it needs no more than the source."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import verl_trees
from verl_trees import from_no_index  # noqa: F401

from verl_fl_overlay import cli, compat, features
from verl_fl_overlay.compat.release import check
from verl_fl_overlay.compat.release.check import Comparison
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.errors import OverlayError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    newest = verl_trees.newest()
    shutil.copytree(newest.folder / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(copy: Path, path: str, old: str, new: str) -> None:
    file = copy / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def run(copy: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = cli.main(["check", str(copy), *options])
    return status, capsys.readouterr().out


def test_holds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1] == f"verl {verl_trees.newest().version} works"
    assert "engine.new" not in out
    assert "; --all lists every one" in out
    _, out = run(copy, capsys, "--all")
    assert re.search(r"^engine\.new +OK$", out, re.MULTILINE)


def test_required_hook_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/engine/base.py", "def train_batch(", "def train_one_batch(")
    status, out = run(copy, capsys)
    assert status == 1
    moved = "verl.workers.engine.base:BaseEngine.train_batch -> verl.workers.engine.base:BaseEngine.train_one_batch"
    assert f"MOVED {moved} " in out
    version = verl_trees.newest().version
    assert out.splitlines()[-1] == f"verl-fl-overlay will refuse to load on verl {version}: engine.train_batch"
    assert "verl-fl-overlay refuses to load when verl.workers.engine.base is imported" in out


def test_optional_hook_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/utils/model.py", "def load_valuehead_model(", "def load_value_model(")
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1].endswith("works with less: attention.value_model")
    assert "means: attention goes on without it" in out


def test_engine_s_module_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It serves who trains on that engine only, so nobody is refused."""
    (copy / "verl/workers/engine/veomni").rename(copy / "verl/workers/engine/veomni_renamed")
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1].endswith("works with less: engine.initialize.veomni")
    assert "means: phase goes on without it, which is warned about where veomni is installed" in out


def test_engine_s_method_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/engine/veomni/transformer_impl.py", "def initialize(", "def set_up(")
    edit(copy, "verl/workers/engine/fsdp/transformer_impl.py", "def initialize(", "def set_up(")
    status, out = run(copy, capsys)
    assert status == 1
    refused = "engine.initialize.fsdp, engine.initialize.veomni (only where veomni is installed)"
    assert out.splitlines()[-1].endswith(f"will refuse to load on verl {verl_trees.newest().version}: {refused}")


def test_one_of_an_optional_group_takes_the_others_with_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/checkpoint_engine/base.py", "def get(cls, backend", "def look_up(cls, backend")
    status, out = run(copy, capsys, "--json")
    hooks = {hook["name"]: hook for hook in json.loads(out)["hooks"]}
    assert status == 0
    assert hooks["flagcx.checkpoint_engine"]["outcome"] == hooks["flagcx.checkpoint_engine_class"]["outcome"]
    assert "flagcx.checkpoint_engine_class cannot be installed" in hooks["flagcx.checkpoint_engine"]["meaning"]


def test_attribute_of_instances_that_is_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hook can be put on without it, even a required one, and the attribute is named."""
    edit(copy, "verl/workers/engine/base.py", "self.mode", "self.mode_renamed")
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1].endswith("works with less: engine.enter")
    read = "verl.workers.engine.base:BaseEngineCtx.mode"
    assert f"means: phase goes on with less: the hook is installed, and does not find {read} as it was" in out


def test_attribute_of_instances_that_became_a_property(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = "verl/workers/engine/base.py"
    edit(copy, base, "self.mode = mode", "self._mode = mode")
    edit(copy, base, "    def __enter__", "    @property\n    def mode(self): ...\n\n    def __enter__")
    status, out = run(copy, capsys, "--json")
    (hook,) = [hook for hook in json.loads(out)["hooks"] if hook["name"] == "engine.enter"]
    assert status == 0
    assert (hook["outcome"], hook["relies_on"][0]["status"]) == ("review", "SIGNATURE")


def test_what_only_the_trial_step_uses(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/utils/losses.py", "def sft_loss(", "def loss_of_sft(")
    status, out = run(copy, capsys)
    assert status == 0
    assert out.splitlines()[-1].endswith("works; parity, tune and warmup cannot run on it")
    assert "    use verl.workers.utils.losses:sft_loss: MOVED" in out


def test_hook_of_a_feature_that_does_not_exist(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", {})
    edit(copy, "verl/workers/engine/base.py", "def train_batch(", "def train_one_batch(")
    (finding,) = [f for f in check.check(Tree(copy, "a copy")).findings if f.fatal]
    assert finding.meaning.startswith("phase: verl-fl-overlay refuses to load")


def test_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, "verl/workers/engine/base.py", "def __exit__(self, exc_type,", "def __exit__(self, kind,")
    status, out = run(copy, capsys, "--json")
    result = json.loads(out)
    assert status == 1
    assert not result["holds"]
    hook = next(h for h in result["hooks"] if h["name"] == "engine.exit")
    assert hook["status"] == "SIGNATURE"
    assert hook["fatal"]
    assert "exc_type" in hook["detail"]
    assert any(line.startswith("+def __exit__(self, kind,") for line in hook["diff"])


def test_against_an_older_release(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(copy, capsys, "--against", "0.7.0")
    assert status == 0
    assert "(against verl 0.7.0)" in out or verl_trees.newest().version == "0.7.0"


def test_a_version_never_seen_is_compared_with_the_nearest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "verl/version/version").write_text("0.9.7")
    _, out = run(copy, capsys, "--json")
    against = {hook["against"] for hook in json.loads(out)["hooks"] if hook["against"]}
    assert compat.RELEASES[-1] in against


def test_imports_neither_verl_nor_torch(copy: Path) -> None:
    program = (
        "import sys; from verl_fl_overlay import cli; cli.main(['check', sys.argv[1]]); "
        "print([m for m in ('verl', 'torch', 'flag_gems', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_garbage_collector_waits_meanwhile(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took half of the time, and what is parsed need not be gone through at the end either."""
    collected: set[bool] = set()

    def counted(*arguments: object) -> Comparison:
        collected.add(gc.isenabled())
        return compare(*arguments)  # type: ignore[arg-type]

    compare = check._compare
    monkeypatch.setattr(check, "_compare", counted)
    gc.unfreeze()
    check.check(Tree(copy, "a copy"))
    assert collected == {False}
    assert gc.get_freeze_count() > 100_000
    assert gc.isenabled()
    with pytest.raises(OverlayError, match="is not pinned"):
        check.check(Tree(copy, "a copy"), against="0.1")
    assert gc.isenabled()


def test_is_not_on_the_load_path() -> None:
    program = "import sys, verl_fl_overlay; print([m for m in sys.modules if m.startswith('verl_fl_overlay.compat.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['verl_fl_overlay.compat.chosen', 'verl_fl_overlay.compat.pins']"
