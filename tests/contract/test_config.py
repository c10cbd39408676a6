"""What ``verl-fl config`` prints is taken by hydra with the configuration of the verl that is installed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

hydra = pytest.importorskip("hydra")

from verl_fl_overlay import compat  # noqa: E402
from verl_fl_overlay.cli import main  # noqa: E402
from verl_fl_overlay.compat.release.overrides import ENGINES, TASKS  # noqa: E402


@pytest.mark.parametrize(("task", "engine"), itertools.product(TASKS, ENGINES))
def test_hydra_takes_what_is_printed(task: str, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    verl = compat.find_verl()
    if verl is None or not verl.has("version/version"):
        pytest.skip("no verl is installed")
    assert main(["config", "--chip", "nvidia", "--task", task, "--engine", engine, "--prompt", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = next((o.partition("=")[2] for o in found["command"].split() if o.startswith("--config-name=")), "")
    name = name or ("sft_trainer_engine" if task == "sft" else "ppo_trainer")
    given = [f"{override['key']}={override['value']}" for override in found["overrides"]]
    given += [f"{key}=1" for key in found["left to you"]]
    with hydra.initialize_config_dir(str(Path(verl.folder, "trainer/config")), version_base=None):
        composed = hydra.compose(name, given)
    if task == "sft":
        assert composed.engine.get("strategy", engine) == engine
    else:
        assert composed.actor_rollout_ref.actor.strategy == composed.actor_rollout_ref.ref.strategy == engine
        assert composed.critic.strategy == (engine if task == "ppo" or engine == "megatron" else "fsdp")
    assert list(composed.trainer.logger) == ["console"]
