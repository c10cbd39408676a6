"""The pins are those of the hooks: of every release, from its own source."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import verl_trees
from verl_trees import from_no_index  # noqa: F401

from verl_fl_overlay import cli, compat
from verl_fl_overlay.compat import pins, trial
from verl_fl_overlay.compat.pins import Fingerprint
from verl_fl_overlay.compat.release import check, pinning
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.errors import OverlayError

FOLDER = Path(compat.__file__).parent
each_release = pytest.mark.parametrize("release", compat.RELEASES)


@each_release
def test_every_hook_and_all_it_relies_on_is_pinned(release: str) -> None:
    hooks = compat.select(compat.InstalledVerl(release, "")).hooks
    pinned = pins.load(release)
    assert sorted(pinned) == pinning.targets(hooks), "the hooks changed: run verl-fl pin --write for every release"
    assert [target for target, pin in pinned.items() if pin.kind == "missing"] == []


@each_release
def test_all_that_the_trial_step_uses_is_pinned(release: str) -> None:
    pinned = pins.load(release, pins.TRIAL)
    assert sorted(pinned) == sorted(trial.RELIES_ON), "the trial changed: run verl-fl pin --write for every release"
    assert [target for target, pin in pinned.items() if pin.kind == "missing"] == []


@each_release
def test_pins_are_what_the_release_has(release: str) -> None:
    tree = verl_trees.tree(release)
    file = FOLDER / "pins" / f"{release}.json"
    assert pinning.as_text(pinning.pins_of(tree)) == file.read_text(encoding="utf-8")
    report = check.check(tree)
    assert report.verdict == f"verl {release} works"


def test_every_release_has_pins_and_constraints() -> None:
    assert {file.stem for file in (FOLDER / "pins").glob("*.json")} == set(compat.RELEASES)
    constraints = {file.stem.removeprefix("verl-") for file in (FOLDER / "constraints").glob("verl-*.txt")}
    assert constraints == set(compat.RELEASES)


def test_adding_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What CONTRIBUTING tells to do, for a release that does not exist: its changed function is pinned as it is."""
    newest = verl_trees.tree(compat.RELEASES[-1])
    shutil.copytree(newest.folder / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    base = tmp_path / "verl/workers/engine/base.py"
    base.write_text(base.read_text().replace("engine_cls(*args, **kwargs)", "(engine_cls)(*args, **kwargs, new=1)"))
    (tmp_path / "verl/version/version").write_text("99.1.0\n")

    assert cli.main(["check", str(tmp_path)]) == 0
    before = capsys.readouterr().out
    assert before.endswith("verl 99.1.0 works, review these: engine.new\n")
    assert f"against verl {compat.RELEASES[-1]}" in before
    assert "+    return (engine_cls)(*args, **kwargs, new=1)" in before

    monkeypatch.setattr(pinning, "__file__", str(tmp_path / "compat" / "release" / "pinning.py"))
    (tmp_path / "compat" / "pins").mkdir(parents=True)
    assert cli.main(["pin", str(tmp_path), "--write"]) == 2, "an installed overlay is left as it is"
    assert capsys.readouterr().err.startswith("verl-fl pin: --write is for a checkout")
    assert not list((tmp_path / "compat" / "pins").iterdir())
    (tmp_path / "pyproject.toml").touch()
    assert cli.main(["pin", str(tmp_path), "--write"]) == 0
    written = json.loads((tmp_path / "compat/pins/99.1.0.json").read_text())
    assert written["verl"] == "99.1.0"
    assert cli.main(["pin", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2]) == written

    load = pins.load

    def with_new(release: str, part: str = pins.HOOKS, package: pins.Package = pins.VERL) -> dict[str, Fingerprint]:
        if release != "99.1.0":
            return load(release, part, package)
        return {target: Fingerprint.from_json(pin) for target, pin in written[part].items()}

    monkeypatch.setattr(compat, "RELEASES", (*compat.RELEASES, "99.1.0"))
    monkeypatch.setattr(pins, "load", with_new)
    assert check.check(Tree(tmp_path, "a copy")).verdict == "verl 99.1.0 works"


def test_pins_without_a_target_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = verl_trees.newest()
    shutil.copytree(newest.folder / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    for file, name in (("workers/engine/base.py", "train_batch"), ("workers/utils/losses.py", "sft_loss")):
        path = tmp_path / "verl" / file
        path.write_text(path.read_text().replace(f"def {name}(", f"def {name}_renamed("))
    monkeypatch.setattr(pinning, "__file__", str(tmp_path / "compat" / "release" / "pinning.py"))
    (tmp_path / "compat" / "pins").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert cli.main(["pin", str(tmp_path), "--write"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"verl-fl pin: nothing was written; verl {newest.version} has no ")
    assert "verl.workers.engine.base:BaseEngine.train_batch" in said
    assert "verl.workers.utils.losses:sft_loss" in said
    assert not list((tmp_path / "compat" / "pins").iterdir())


@pytest.mark.parametrize("damage", ["cut", "emptied", "of another kind", "removed"])
def test_pins_that_are_damaged_or_gone(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named and nothing is taken for right, where a hook is installed and where a release is checked."""
    shutil.copytree(FOLDER / "pins", tmp_path / "other_compat" / "pins")
    (tmp_path / "other_compat" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_compat", raising=False)  # that of the test before
    monkeypatch.setattr(pins, "__package__", "other_compat")
    pins.load.cache_clear()
    file = tmp_path / "other_compat" / "pins" / "0.8.0.json"
    left = {"cut": file.read_bytes()[:3000], "emptied": b"", "of another kind": b'{"functions": {"f": {"type": 1}}}'}
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(left[damage])

    hook = next(h for h in compat.select(compat.InstalledVerl("0.9.1", "")).hooks if h.name == "engine.train_batch")
    told = "compat/pins/0.8.0.json is missing or damaged"
    with pytest.raises(OverlayError, match=f"{told}.*: reinstall"):
        pins.verify(hook, lambda self, a, b, c, d: None)
    assert cli.main(["check", str(verl_trees.newest().folder)]) == 2
    assert told in capsys.readouterr().err
