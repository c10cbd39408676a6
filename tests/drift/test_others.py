"""Every hook on transformers against every kind of change there: ``check`` and the process itself say the same.

The real files of every pinned release that is here are changed one function at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import verl_trees
from drift import changes, copies

from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import PACKAGES, VERL, Package, top_level
from verl_fl_overlay.compat.release import check, pinning
from verl_fl_overlay.compat.release.check import Status
from verl_fl_overlay.errors import HookError
from verl_fl_overlay.hooks import Hook, HookSet, State

CASES = [
    pytest.param(package, release, hook, id=f"{package.distribution}-{release}-{hook.name}")
    for package in PACKAGES.values()
    if package != VERL
    for release in package.releases
    for hook in pinning.hooks_that_use(package)
    if top_level(hook.target) == package.name
]
each = pytest.mark.parametrize(("package", "release", "hook"), CASES)


@functools.cache
def files(package: Package, release: str) -> dict[str, str]:
    return verl_trees.read_for_pins(verl_trees.tree(release, package))


def changed(package: Package, release: str, hook: Hook, change: Any, folder: Path) -> tuple[check.Finding, str]:
    """Return what ``check`` finds for the hook where its target was changed, and the text of the changed file."""
    path = f"{hook.module.replace('.', '/')}.py"
    text = change(files(package, release)[path], hook.attribute)
    if text is None:
        pytest.skip(f"{hook.attribute} has nothing to do this to")
    tree = copies.write({**files(package, release), path: text}, folder)
    assert (tree.package, tree.version) == (package, release)
    report = check.check(tree, source_of=verl_trees.find)
    return next(finding for finding in report.findings if finding.hook.name == hook.name), text


def state(hook: Hook, text: str, folder: Path) -> tuple[State, str]:
    """Import the changed module, with nothing else of its package, and return what becomes of the hook."""
    file = folder / f"{hook.module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    alone = dataclasses.replace(hook, relies_on=())
    versions = mock.patch("importlib.metadata.version", return_value="99")  # it is asked of placeholders too
    with versions, copies.imported(folder, hook.module):
        hooks = HookSet([alone], verify=pins.verify)
        try:
            hooks.install()
        except HookError:
            assert hook.required
        (status,) = hooks.report()
        found = status.state, status.detail
        hooks.remove()
    return found


@pytest.mark.parametrize("kind", changes.BREAKING)
@each
def test_breaking_change(package: Package, release: str, hook: Hook, kind: str, tmp_path: Path) -> None:
    change, status = changes.BREAKING[kind]
    found, text = changed(package, release, hook, change, tmp_path / "all")
    assert found.target.status.value == status
    known = "which is that of" in found.target.detail  # another pinned release's parameters
    assert found.breaks != known
    became, detail = state(hook, text, tmp_path / "alone")
    assert (became is State.INSTALLED) == known, detail
    if found.target.status is Status.SIGNATURE and not known:
        assert f"as in {package.distribution} {package.releases[-1]}" in detail


@pytest.mark.parametrize("kind", [*changes.WORTH_A_LOOK, *changes.HARMLESS])
@each
def test_change_that_breaks_nothing(package: Package, release: str, hook: Hook, kind: str, tmp_path: Path) -> None:
    change, status = changes.WORTH_A_LOOK.get(kind) or (changes.HARMLESS[kind], "OK")
    found, text = changed(package, release, hook, change, tmp_path / "all")
    assert found.target.status.value == status
    assert not found.breaks
    assert state(hook, text, tmp_path / "alone")[0] is State.INSTALLED
