"""verl 0.9.1's ``main_ppo`` with GRPO on a CPU, in Ray, two workers: ``python examples/grpo.py [FOLDER]``.

The trainer, its Ray workers, agent loop, transfer queue, advantage and loss are verl's; generation is ``hf_rollout``.
Writes FOLDER/grpo.png, reward and loss against steps.  Exit status 1 if the reward did not rise, the steps are not all
there, or a required hook was never called in some worker.  Needs ``pip install TransferQueue matplotlib`` too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from sft import end, never_called, overlay_environment, rank_reports, recipe

WORKERS = 2
EXAMPLES = Path(__file__).resolve().parent
STEP = re.compile(r"step:(\d+) - ")
METRICS = {"reward": "critic/score/mean", "loss": "actor/pg_loss"}


def trainer_arguments(folder: Path, steps: int) -> list[str]:
    """Return the settings of verl's PPO trainer."""
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/problems.parquet",
        f"data.val_files={folder}/problems.parquet",
        "data.train_batch_size=32",
        "data.max_prompt_length=64",
        "data.max_response_length=4",
        "data.dataloader_num_workers=0",
        f"reward.custom_reward_function.path={EXAMPLES}/arithmetic.py",
        "reward.custom_reward_function.name=reward",
        "reward.num_workers=1",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.model.external_lib=hf_rollout",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.actor.optim.lr=5e-3",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={WORKERS}",
        "trainer.logger=[console]",
        "trainer.project_name=demo",
        "trainer.experiment_name=grpo",
        "trainer.total_epochs=1000",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=False",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={folder}/checkpoints",
        # Ray places an actor where a CPU is free, although verl's small actors hold none while they run.
        "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.include_dashboard=False",
        f"hydra.run.dir={folder}/hydra",
        "hydra.output_subdir=null",
    ]


def environment(folder: Path) -> dict[str, str]:
    """Return the overlay's environment, with this folder on Python's path in every Ray process."""
    paths = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    return {
        **overlay_environment(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def metric(line: str, name: str) -> float:
    """Return one metric of a line of verl's console logger."""
    found = re.search(rf"{re.escape(name)}:(?:np\.float\w+\()?([-+.\deE]+)", line)
    if found is None:
        raise SystemExit(f"verl logged no {name}: {line}")
    return float(found[1])


def steps_of(lines: Iterator[str], log: Any) -> Iterator[dict[str, float]]:
    """Yield step, reward and loss as verl's console logger prints them; every line goes to ``log``."""
    for line in lines:
        log.write(line)
        match = STEP.search(line)
        if match:
            yield {"step": int(match[1]), **{key: metric(line, name) for key, name in METRICS.items()}}


def train(folder: Path, steps: int) -> list[dict[str, float]]:
    """Run the trainer, showing progress; return step, mean reward and loss of every step.

    Raises:
        SystemExit: the trainer failed; the end of its log is printed.
    """
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *trainer_arguments(folder, steps)]
    seen: list[dict[str, float]] = []
    with (
        open(folder / "trainer.log", "w", encoding="utf-8", buffering=1) as log,
        subprocess.Popen(
            command,
            env=environment(folder),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as trainer,
    ):
        assert trainer.stdout is not None
        for step in steps_of(iter(trainer.stdout), log):
            seen.append(step)
            bar = "#" * round(step["reward"] * 40)
            print(f"  step {step['step']:3.0f}/{steps}  loss {step['loss']:+.4f}  reward {step['reward']:.3f} {bar}")
    if trainer.returncode:
        print("".join((folder / "trainer.log").read_text().splitlines(keepends=True)[-60:]))
        raise SystemExit(f"verl's trainer failed with exit status {trainer.returncode}; log: {folder / 'trainer.log'}")
    return seen


def plot(seen: list[dict[str, float]], file: Path) -> None:
    """Draw mean reward and policy loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for axis, name, label in zip(axes, METRICS, ("mean reward", "policy loss"), strict=True):
        axis.plot([step["step"] for step in seen], [step[name] for step in seen], marker=".")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title(f"GRPO on sums of two digits, verl {version('verl')}, {WORKERS} Ray workers on a CPU")
    axes[1].set_xlabel("step")
    figure.savefig(file, dpi=120)


def faults_of(seen: list[dict[str, float]], steps: int, reports: list[dict[str, Any]]) -> list[str]:
    """Return in words what is not as it should be."""
    faults = []
    rewards = [step["reward"] for step in seen]
    if [step["step"] for step in seen] != list(range(1, steps + 1)):
        faults.append(f"steps {[int(step['step']) for step in seen]} instead of 1 to {steps}")
    elif not mean(rewards[-5:]) > mean(rewards[:5]):
        faults.append(f"the mean reward did not rise: {mean(rewards[:5]):.3f} -> {mean(rewards[-5:]):.3f}")
    if len(reports) != WORKERS:
        faults.append(f"{len(reports)} workers reported instead of {WORKERS}")
    for report in reports:
        missed = never_called(report)
        if missed:
            faults.append(f"worker {report['process']['rank']} never called {', '.join(missed)}")
        faults += report["problems"]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/grpo"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=30, help="at least 10")
    options = parser.parse_args()
    if options.steps < 10:
        parser.error(f"--steps {options.steps}: the first five steps are compared with the last five")
    if not version("verl").startswith("0.9.1"):
        parser.error(f"verl {version('verl')} is here; hf_rollout is written for the rollout interface of verl 0.9.1")
    for module, package in {"transfer_queue": "TransferQueue", "matplotlib": "matplotlib"}.items():
        if not find_spec(module):
            parser.error(f"{module} is missing: pip install {package}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / "reports").glob("*.json"):
        stale.unlink()
    subprocess.run([sys.executable, EXAMPLES / "arithmetic.py", folder], check=True)

    print(f"verl's PPO trainer, GRPO, {WORKERS} Ray workers, CPU; until its first step it imports for half a minute:")
    begun = time.monotonic()
    seen = train(folder, options.steps)
    seconds = time.monotonic() - begun
    reports = rank_reports(folder)
    faults = faults_of(seen, options.steps, reports)

    if reports:
        verl = reports[0]["verl"]
        print(f"  verl        {verl['version']}, shim {verl['shim']}, torch {reports[0]['torch']}")
    print(f"  steps       {len(seen)} in {seconds:.0f} s, start of the processes included")
    if seen:
        plot(seen, folder / "grpo.png")
        first, last = (mean(step["reward"] for step in part) for part in (seen[:5], seen[-5:]))
        print(f"  reward      {first:.3f} -> {last:.3f} (means of five steps)")
        print(f"  plot        {folder / 'grpo.png'}")
    own = recipe("grpo_vllm.sh", folder, DATA="problems.parquet")
    return end(reports, faults, "worker", folder, f"{own}  # in an environment with vLLM, on a GPU")


if __name__ == "__main__":
    raise SystemExit(main())
