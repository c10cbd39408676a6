"""The recipes of examples/ fit every release that they name: no key is unknown there, and verl's own checks pass."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from processes import PLAIN, result, warm
from recipes import RECIPES, Place

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("recipes")  # they share the run

PROGRAM = Path(__file__).with_name("composed.py")
ACTORS = {"grpo_vllm.sh": "FSDPActorConfig", "megatron.sh": "McoreActorConfig"}


def for_this_release(script: str) -> bool:
    first, last = re.search(r"For verl (\S+) to (\S+)\.$", (RECIPES / script).read_text(), re.MULTILINE).groups()
    return Version(first) <= Version(version("verl")) <= Version(last)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Return recipe -> what verl makes of its parts, in one process."""
    place, asked = Place(tmp_path_factory.mktemp("clone")), {}
    for script in filter(for_this_release, (*ACTORS, "sft.sh")):
        assert place.bash(RECIPES / script, MODEL=str(tiny_model)).returncode == 0
        asked[script] = place.asked()[2:]
    stand_ins = str(RECIPES.parent / "stand_ins")  # of what verl 0.7.0's trainer imports
    return result(PROGRAM, json.dumps(asked), env={**PLAIN, "PYTHONPATH": stand_ins}, start=warm)


@pytest.mark.parametrize("script", ACTORS)
def test_grpo(script, made):
    if not for_this_release(script):
        pytest.skip("the recipe does not name this release")
    assert made[script] == [ACTORS[script], "RolloutConfig"]


def test_sft(made):
    assert made["sft.sh"] == ["HFModelConfig", "FSDPEngineConfig", "FSDPOptimizerConfig"]
