"""The hooks of every release as records: what a reader, the gate and the features need of each is there and fits."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from verl_fl_overlay import compat, features
from verl_fl_overlay.compat.pins import PACKAGES
from verl_fl_overlay.hooks import Hook

TARGET = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)*:\w+(\.\w+)*")


@pytest.fixture(params=compat.RELEASES)
def hooks(request: pytest.FixtureRequest) -> tuple[Hook, ...]:
    return compat.select(compat.InstalledVerl(request.param, "")).hooks


def test_hook_records_are_complete(hooks: tuple[Hook, ...]) -> None:
    assert len({h.name for h in hooks}) == len(hooks), "names are unique"
    for hook in hooks:
        for field in ("name", "module", "attribute", "feature", "why", "upstream", "until"):
            assert getattr(hook, field).strip(), f"{hook.name} has no {field}"
        assert hook.upstream.startswith("https://")


def test_features_exist(hooks: tuple[Hook, ...]) -> None:
    assert {hook.feature for hook in hooks} <= set(features.FEATURES)


@pytest.mark.parametrize("field", ["required", "needs"])
def test_what_decides_over_a_group_is_the_same_in_all_of_it(hooks: tuple[Hook, ...], field: str) -> None:
    """Hooks of one feature on one module are installed together or not at all, so they are refused together, too."""
    groups = defaultdict(set)
    for hook in hooks:
        groups[hook.feature, hook.module].add(getattr(hook, field))
    assert {group: values for group, values in groups.items() if len(values) > 1} == {}


def test_a_pair_names_hooks_that_are_there_and_name_each_other(hooks: tuple[Hook, ...]) -> None:
    by_name = {hook.name: hook for hook in hooks}
    for hook in filter(lambda hook: hook.pair, hooks):
        assert by_name[hook.pair].pair == hook.name


def test_reliances_are_targets_in_pinned_packages(hooks: tuple[Hook, ...]) -> None:
    wrong = [(h.name, reliance) for h in hooks for reliance in h.relies_on if not TARGET.fullmatch(reliance)]
    assert wrong == []
