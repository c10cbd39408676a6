"""verl's own main_ppo with GRPO in Ray, as the demo runs it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

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
    done = run(EXAMPLE, tmp_path, "--steps", 20, env={}, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.strip().endswith("ok")
    assert done.stdout.count("hooks installed") == 2, "two workers"
    assert (tmp_path / "grpo.png").stat().st_size > 5000
