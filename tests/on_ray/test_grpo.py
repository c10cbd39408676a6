"""verl's own main_ppo with GRPO in Ray, as the demo runs it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
from processes import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


def missing() -> str:
    try:
        found = version("verl")
    except PackageNotFoundError:
        return "needs verl 0.9.1"
    if found != "0.9.1":
        return f"hf_rollout is written for verl 0.9.1; here is {found}"
    absent = [name for name in ("transfer_queue", "matplotlib") if not find_spec(name)]
    return f"needs {', '.join(absent)}" if absent else ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")


def test_reward_rises_with_the_hooks_called_in_every_worker(tmp_path):
    """The demo takes 30 steps; in half of them the mean reward is more than twice that of the first."""
    done = run(EXAMPLE, tmp_path, "--steps", 15, env={}, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.strip().endswith("ok")
    rewards = [float(reward) for reward in re.findall(r"step .* reward (\d\.\d+)", done.stdout)]
    assert len(rewards) == 15
    assert mean(rewards[-5:]) > 1.5 * mean(rewards[:5])
    calls = [int(calls) for calls in re.findall(r"worker \d .* (\d+) calls", done.stdout)]
    assert len(calls) == 2
    assert min(calls) > 15 * 10, "a step enters, trains, infers and leaves more than once"
    assert (tmp_path / "grpo.png").stat().st_size > 5000
