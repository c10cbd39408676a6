"""What ``verl-fl config`` prints is right for every release: each key exists, and changes what verl does by itself."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import verl_trees
from packaging.version import Version

from verl_fl_overlay.compat import RELEASES
from verl_fl_overlay.compat.release import overrides
from verl_fl_overlay.compat.release.overrides import ENGINES, LENGTH, TASKS, TOKENS, TOKENS_SFT, Job
from verl_fl_overlay.compat.release.sources import Tree

yaml = pytest.importorskip("yaml")

CONFIG = "verl/trainer/config"


@functools.cache
def parsed(release: str, path: str) -> dict[str, Any]:
    tree = verl_trees.tree(release)
    text = tree.read(f"{CONFIG}/{path}.yaml")
    assert text is not None, f"verl {tree.version} has no {path}.yaml"
    return yaml.safe_load(text)


def load(tree: Tree, path: str) -> dict[str, Any]:
    return dict(parsed(tree.version, path))


def composed(tree: Tree, job: Job) -> dict[str, Any]:
    """Return the configuration that the job starts from, its groups chosen."""
    if job.task != "sft":
        return load(tree, f"_generated_ppo_{'megatron_' if job.engine == 'megatron' else ''}trainer")
    whole = load(tree, "sft_trainer_engine")
    for default in whole.pop("defaults"):
        if default != "_self_":
            ((group, name),) = default.items()
            chosen = job.engine if job.engine == "megatron" and group.startswith(("engine", "optim")) else name
            whole[group.partition("@")[2]] = load(tree, f"{group.partition('@')[0]}/{chosen}")
    return whole


def value(whole: dict[str, Any], key: str) -> Any:
    found: Any = whole
    for part in key.split("."):
        assert isinstance(found, dict)
        assert part in found, key
        found = found[part]
    return found


GROUPS = ("model_engine", "engine", "optim")


def jobs(release: str) -> list[Job]:
    made = itertools.product(TASKS, ENGINES, ("vllm", "sglang"), ("cuda", "musa"), (None, 40_000), (True, False))
    return [
        Job(Version(release), task, engine, rollout, device, "/m", length, length, packs, has_te=packs)
        for task, engine, rollout, device, length, packs in made
    ]


@pytest.mark.parametrize("release", RELEASES)
def test_every_key_exists_and_is_not_verl_s_default(release: str) -> None:
    tree = verl_trees.tree(release)
    for job in jobs(release):
        whole = composed(tree, job)
        for override in overrides.overrides(job):
            if override.key in GROUPS:
                load(tree, f"{override.key}/{override.value}")
                continue
            default = value(whole, override.key)
            assert str(default) != override.value, f"{override.key} is {default} in verl {release} anyway"
        for key in overrides.left_to_user(job):
            value(whole, key)
        module = overrides.command(job).partition(" -m ")[2].split()[0]
        assert tree.source_of(module), module
        for option in overrides.command(job).split():
            if option.startswith("--config-name="):
                load(tree, option.partition("=")[2])


@pytest.mark.parametrize("release", RELEASES)
def test_models_are_packed_and_limits_are_as_said(release: str) -> None:
    tree = verl_trees.tree(release)
    for job in jobs(release):
        whole, said = composed(tree, job), {o.key: o.value for o in overrides.overrides(job)}
        models = [key.rpartition(".")[0] for key in overrides._models(job)]
        for key in (f"{model}.use_remove_padding" for model in models):
            if job.engine == "megatron" and "use_remove_padding" not in value(whole, key.rpartition(".")[0]):
                continue  # Megatron's critic of 0.7 has no such key
            if job.packs or job.engine != "megatron":
                assert said.get(key, str(value(whole, key))) == str(job.packs), (job, key)
        limits = TOKENS_SFT if job.task == "sft" else TOKENS
        assert {key: value(whole, key) for key in limits} == limits
        if job.task != "sft":
            assert value(whole, "data.max_prompt_length") == value(whole, "data.max_response_length") == LENGTH
        elif job.prompt is None:
            assert value(whole, "data.max_length") == job.longest
