"""Every hook against every kind of upstream change: ``check`` and the gate at run time have to say the same.

The real files of the newest release that is here are changed one function at a time.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import verl_trees
from drift import changes, copies

from verl_fl_overlay import compat
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.release import check, pinning
from verl_fl_overlay.compat.release.check import Outcome, Status
from verl_fl_overlay.errors import HookError
from verl_fl_overlay.hooks import Hook, HookSet, State

NEWEST = compat.RELEASES[-1]
ALL_HOOKS = [h for h in compat.select(compat.InstalledVerl(NEWEST, "")).hooks if h.module.startswith("verl.")]
HOOKS = [h for h in ALL_HOOKS if pins.pinned(h.target)[NEWEST].at == h.target]
BOUND = [h for h in ALL_HOOKS if h not in HOOKS]
"""Hooks on a name that the module imports: the function stands elsewhere."""
WORKING_BASES = {"FSDPEngine", "MegatronEngine", "PlatformBase"}
LEFT_TO_SUBCLASSES = {"forward_step", "prepare_model_inputs", "prepare_model_outputs"}
"""Hooked methods that no base has in working order."""
hooked = pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)


@functools.cache
def files() -> dict[str, str]:
    return copies.hooked_files(verl_trees.tree(NEWEST))


def path_of(target: str) -> str:
    return target.partition(":")[0].replace(".", "/") + ".py"


def changed(hook: Hook, change: Any, folder: Path) -> Any:
    text = change(files()[path_of(hook.target)], hook.attribute)
    if text is None:
        pytest.skip(f"{hook.attribute} has nothing to do this to")
    return copies.write({**files(), path_of(hook.target): text}, folder)


def inherits_another(hook: Hook) -> bool:
    """Whether, without its own method, the class would have another one that works: an engine's or a platform's."""
    node = changes.locate_class(files()[path_of(hook.target)], hook.attribute)
    if hook.attribute.rpartition(".")[2] in LEFT_TO_SUBCLASSES:
        return False
    return node is not None and any(isinstance(b, ast.Name) and b.id in WORKING_BASES for b in node.bases)


def finding(tree: Any, hook: Hook) -> Any:
    return next(f for f in check.check(tree, source_of=verl_trees.find).findings if f.hook.name == hook.name)


def install(folder: Path, hook: Hook) -> tuple[HookSet, HookError | None, dict[str, Any]]:
    """Import the hooked module of the copy and install all hooks on it; say what a call of each target gives."""

    def answer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> str:
        return "hooked"

    group = [dataclasses.replace(h, wrapper=answer) for h in HOOKS if h.module == hook.module]
    with copies.imported(folder, hook.module) as module:
        before = {h.name: static(module, h) for h in group}
        hooks = HookSet(group, verify=pins.verify)
        try:
            hooks.install()
        except HookError as error:
            after = {h.name: static(module, h) for h in group}
            assert all(after[name] is before[name] for name in before), "half-installed"
            hooks.remove()  # or the next import of the module is refused, too
            return hooks, error, {}
        answers, hooked = {}, {s.hook.target for s in hooks.report() if s.state is State.INSTALLED}
        for status in hooks.report():
            if status.state is State.INSTALLED:
                owner: Any = functools.reduce(getattr, status.hook.attribute.split(".")[:-1], module)
                answers[status.hook.name] = getattr(owner, status.hook.attribute.rpartition(".")[2])(object())
            elif status.hook.target not in hooked:  # two features may share one
                assert static(module, status.hook) is before[status.hook.name], "half-installed"
        hooks.remove()
        return hooks, None, answers


def static(module: ModuleType, hook: Hook) -> Any:
    try:
        return functools.reduce(inspect.getattr_static, hook.attribute.split("."), module)
    except AttributeError:
        return None


def assert_same_at_run_time(folder: Path, found: Any) -> None:
    hooks, error, answers = install(folder, found.hook)
    states = {status.hook.name: status for status in hooks.report()}
    assert found.fatal == (error is not None), error
    if found.fatal:
        assert hooks.refusal is error
        assert found.hook.target in str(error)
        assert any(h.name in str(error) for h in HOOKS if h.target == found.hook.target)  # two features may share one
        assert State.INSTALLED not in {status.state for status in states.values()}
    elif any(c.breaks and not c.late for c in (found.target, *found.reliances)):
        assert states[found.hook.name].state is State.FAILED
        assert states[found.hook.name].detail
    else:
        assert answers[found.hook.name] == "hooked"


@hooked
def test_untouched(hook: Hook, tmp_path: Path) -> None:
    found = finding(copies.write(files(), tmp_path), hook)
    assert not found.changed
    assert_same_at_run_time(tmp_path, found)


@pytest.mark.parametrize("kind", changes.BREAKING)
@hooked
def test_breaking_change(hook: Hook, kind: str, tmp_path: Path) -> None:
    change, status = changes.BREAKING[kind]
    found = finding(changed(hook, change, tmp_path), hook)
    if inherits_another(hook) and kind in ("rename", "delete"):
        assert found.target.status is Status.MOVED
        assert found.target.detail.startswith(
            f"{hook.target} -> {f'{hook.target}_renamed' if kind == 'rename' else 'nowhere'};"
        )
        assert not found.breaks
        assert_same_at_run_time(tmp_path, found)
        return
    assert found.target.status.value == status
    if "which is that of verl" in found.target.detail:  # an older release's parameters: hooks know them
        assert not found.breaks
        assert_same_at_run_time(tmp_path, found)
        return
    assert found.breaks
    assert found.fatal == any(h.required for h in HOOKS if (h.feature, h.module) == (hook.feature, hook.module))
    assert found.meaning
    if status == "MOVED":
        assert found.target.detail.endswith(f"-> {hook.target}_renamed")
    if status == "SIGNATURE":
        assert re.search(r"\(.*\) -> .*\(.*\)", found.target.detail)
        assert found.target.diff
    assert_same_at_run_time(tmp_path, found)


@hooked
def test_move_to_another_module(hook: Hook, tmp_path: Path) -> None:
    rest, function = changes.cut(files()[path_of(hook.target)], hook.attribute)
    moved = path_of(changes.MOVED_MODULE)
    tree = copies.write({**files(), path_of(hook.target): rest, moved: function}, tmp_path)
    found = finding(tree, hook)
    name = hook.attribute.rpartition(".")[2]
    assert found.target.status is Status.MOVED
    assert f"{hook.target} -> {changes.MOVED_MODULE}:{name}" in found.target.detail
    assert found.breaks != inherits_another(hook)
    assert_same_at_run_time(tmp_path, found)


@hooked
def test_move_that_leaves_the_old_name(hook: Hook, tmp_path: Path) -> None:
    """A whole class, or a function, goes elsewhere and is imported where it was."""
    text = files()[path_of(hook.target)]
    top = hook.attribute.partition(".")[0]
    moved = path_of(changes.MOVED_MODULE)
    shell = f"from {changes.MOVED_MODULE} import {top}\n"
    found = finding(copies.write({**files(), path_of(hook.target): shell, moved: text}, tmp_path), hook)
    assert found.target.status is Status.MOVED
    assert f"-> {changes.MOVED_MODULE}:{hook.attribute}" in found.target.detail
    assert not found.target.breaks


@pytest.mark.parametrize("kind", changes.WORTH_A_LOOK)
@hooked
def test_change_worth_a_look(hook: Hook, kind: str, tmp_path: Path) -> None:
    change, status = changes.WORTH_A_LOOK[kind]
    found = finding(changed(hook, change, tmp_path), hook)
    assert found.target.status.value == status
    assert not found.breaks
    if status == "BODY changed":
        assert any(line.startswith("+") and not line.startswith("+++") for line in found.target.diff)
    if kind == "wrap":
        assert "@retried" in found.target.detail
    assert_same_at_run_time(tmp_path, found)


@pytest.mark.parametrize("kind", changes.HARMLESS)
@hooked
def test_harmless_change(hook: Hook, kind: str, tmp_path: Path) -> None:
    tree = changed(hook, changes.HARMLESS[kind], tmp_path)
    assert tree.read(path_of(hook.target)) != files()[path_of(hook.target)]
    found = finding(tree, hook)
    assert found.target.status is Status.OK, found.target.diff
    assert_same_at_run_time(tmp_path, found)


@hooked
def test_module_that_is_gone(hook: Hook, tmp_path: Path) -> None:
    tree = copies.write({path: text for path, text in files().items() if path != path_of(hook.target)}, tmp_path)
    found = finding(tree, hook)
    assert found.target.status is Status.MISSING
    assert "is gone" in found.target.detail
    assert found.breaks
    assert found.outcome is (Outcome.REFUSED if hook.required and not hook.needs else Outcome.WITHOUT)


@pytest.mark.parametrize(
    ("hook", "reliance"),
    [(hook, r) for hook in HOOKS for r in hook.relies_on if r in pins.load(NEWEST)],
    ids=lambda value: value.name if isinstance(value, Hook) else value.rpartition(":")[2],
)
def test_reliance_that_is_gone(hook: Hook, reliance: str, tmp_path: Path) -> None:
    name = reliance.rpartition(":")[2].rpartition(".")[2]
    package = path_of(reliance).rpartition("/")[0]  # whose other files may use the name while they are imported
    renamed = {
        path: re.sub(rf"\b{name}\b", f"{name}_renamed", text) if path.rpartition("/")[0] == package else text
        for path, text in files().items()
    }
    assert renamed[path_of(reliance)] != files()[path_of(reliance)]
    found = finding(copies.write(renamed, tmp_path), hook)
    broken = next(c for c in found.reliances if c.target == reliance)
    assert broken.status in (Status.MOVED, Status.MISSING)
    if broken.status is Status.MOVED and inherits_another(hook):  # what a class does not assign, its base may
        assert found.outcome is Outcome.REVIEW
        return
    assert found.breaks
    assert broken.late == (pins.pinned(reliance)[NEWEST].kind == pins.INSTANCE_ATTRIBUTE)
    assert found.outcome is (Outcome.REFUSED if hook.required and not broken.late else Outcome.WITHOUT)
    # An optional hook's reliance in a module that is not loaded yet is missed when the wrapper reads it.
    if reliance.partition(":")[0] == hook.module or hook.required:
        assert_same_at_run_time(tmp_path, found)


def test_new_abstract_method_of_a_class_that_a_hook_subclasses(tmp_path: Path) -> None:
    subclassed = [t for t in pinning.targets(tuple(HOOKS)) if pins.pinned(t)[NEWEST].kind == "class"]
    if not subclassed:
        pytest.skip(f"the hooks of {NEWEST} subclass nothing")
    for target in subclassed:
        name = target.rpartition(":")[2]
        text = re.sub(
            rf"(class {name}\(.*\):\n)",
            r"\1    @abc.abstractmethod\n    def something_new(self): ...\n",
            files()[path_of(target)],
        )
        report = check.check(copies.write({**files(), path_of(target): text}, tmp_path))
        comparisons = [c for f in report.findings for c in f.reliances if c.target == target]
        assert {c.status for c in comparisons} == {Status.SIGNATURE}
        assert all("something_new" in c.detail for c in comparisons)
        assert not report.holds


bound = pytest.mark.parametrize("hook", BOUND, ids=lambda hook: hook.name)


@bound
def test_imported_name_untouched(hook: Hook, tmp_path: Path) -> None:
    assert not finding(copies.write(files(), tmp_path), hook).changed


@bound
def test_imported_name_that_the_module_uses_no_more(hook: Hook, tmp_path: Path) -> None:
    text = re.sub(rf"\b{hook.attribute}\b", f"{hook.attribute}_of_old", files()[path_of(hook.target)])
    found = finding(copies.write({**files(), path_of(hook.target): text}, tmp_path), hook)
    assert found.breaks
    assert found.target.status in (Status.MISSING, Status.MOVED)


@bound
def test_imported_name_whose_definition_changes(hook: Hook, tmp_path: Path) -> None:
    module, _, name = pins.pinned(hook.target)[NEWEST].at.partition(":")
    path = module.replace(".", "/") + ".py"
    for old, new, status in (
        (f"def {name}(", f"def {name}(added, ", Status.SIGNATURE),
        (f"def {name}(", f"def {name}_renamed(", Status.MOVED),
    ):
        assert old in files()[path]
        found = finding(copies.write({**files(), path: files()[path].replace(old, new, 1)}, tmp_path), hook)
        assert (found.target.status, found.breaks) == (status, True)
