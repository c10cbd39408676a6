"""What ``verl-fl config`` prints is taken by hydra with the configuration of the verl that is installed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from packaging.version import Version

hydra = pytest.importorskip("hydra")

from verl_fl_overlay import compat  # noqa: E402
from verl_fl_overlay.cli import main  # noqa: E402
from verl_fl_overlay.compat.release import overrides  # noqa: E402
from verl_fl_overlay.compat.release.overrides import ENGINES, TASKS, Job  # noqa: E402


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


def test_verl_takes_an_engine_that_stays_awake(capsys: pytest.CaptureFixture[str]) -> None:
    """The switch is a field of verl's class and not in its files."""
    config = pytest.importorskip("verl.utils.config", reason="needs verl", exc_type=ImportError)
    assert main(["config", "--chip", "metax", "--json"]) == 0
    given = [f"{override['key']}={override['value']}" for override in json.loads(capsys.readouterr().out)["overrides"]]
    with hydra.initialize_config_dir(str(Path(compat.find_verl().folder, "trainer/config")), version_base=None):
        composed = hydra.compose("ppo_trainer", [*given, "data.train_files=1", "trainer.n_gpus_per_node=1"])
    rollout = config.omega_conf_to_dataclass(composed.actor_rollout_ref.rollout)
    assert (rollout.enable_sleep_mode, rollout.free_cache_engine) == (False, False)


LETTERS = ("plain", "with space", "a,b", "a=b", "[a]", "{a}", "(a)", "a#b", "a&b", "a~", "a;b", "a`b", "a!", "end ")
QUOTES = ("it's", 'say "a"', "back\\slash", "end\\", "a\\'b", "a\\\\'b")


@pytest.mark.parametrize("name", [*LETTERS, *QUOTES, "\u6a21\u578b"])
def test_hydra_reads_the_model_s_folder_whatever_its_name(name: str) -> None:
    """A comma would be a sweep, a letter beyond ASCII no word at all."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    job = Job(Version("0.9.1"), "sft", "fsdp", "vllm", "cuda", f"/models/{name}")
    (path,) = (override for override in overrides.overrides(job) if override.key == "model.path")
    assert OverridesParser.create().parse_override(f"{path.key}={path.value}").value() == job.model
    assert (path.value == job.model) == (name == "plain")
