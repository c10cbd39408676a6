"""verl's own SFT trainer on a CPU, two ranks, with the overlay: ``python examples/sft.py [FOLDER]``.

Nothing of verl is edited: the overlay comes in through VERL_USE_EXTERNAL_MODULES and VERL_FL_DEVICE alone.
Exit status 1 if the loss did not fall or a required hook was never called in some rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RANKS = 2
STEP = re.compile(r"step:(\d+) - .*?train/loss:(?:np\.float\w+\()?([-+.\deE]+)")


def trainer_arguments(folder: Path, steps: int) -> list[str]:
    """Return the settings of verl's SFT trainer."""
    return [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        "data.train_batch_size=32",
        "data.micro_batch_size_per_gpu=8",
        "data.max_token_len_per_gpu=512",
        "data.max_length=64",
        "++data.num_workers=0",
        f"model.path={folder}/model",
        "engine=fsdp",
        "engine.strategy=fsdp2",
        "engine.use_torch_compile=False",
        "optim.lr=3e-3",
        "optim.lr_warmup_steps_ratio=0.0",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        "trainer.project_name=demo",
        "trainer.experiment_name=sft",
        "trainer.total_epochs=100",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=10",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
        "hydra.output_subdir=null",
    ]


def overlay_environment(folder: Path) -> dict[str, str]:
    """Return the environment that brings the overlay in, and has every rank report."""
    return {
        **os.environ,
        **without_images(),
        "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
        "VERL_FL_DEVICE": "cpu",
        "VERL_FL_REPORT_DIR": str(folder / "reports"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def without_images() -> dict[str, str]:
    """Return what verl 0.7.0 needs to start without torchvision; see ``stand_ins``."""
    if version("verl") != "0.7.0" or find_spec("torchvision"):
        return {}
    paths = [str(Path(__file__).with_name("stand_ins").resolve()), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def losses(lines: Iterator[str], log: Any) -> Iterator[tuple[int, float]]:
    """Yield (step, loss) as verl's console logger prints them; every line goes to ``log``."""
    for line in lines:
        log.write(line)
        match = STEP.search(line)
        if match:
            yield int(match[1]), float(match[2])


def train(folder: Path, steps: int) -> list[float]:
    """Run the trainer, showing progress; return the loss of every step.

    Raises:
        SystemExit: the trainer failed; the end of its log is printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", "--standalone"]
    command += ["-m", "verl.trainer.sft_trainer", *trainer_arguments(folder, steps)]
    seen: list[float] = []
    with (
        open(folder / "trainer.log", "w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=overlay_environment(folder),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as trainer,
    ):
        assert trainer.stdout is not None
        for step, loss in losses(iter(trainer.stdout), log):
            seen.append(loss)
            if sys.stdout.isatty():
                print(f"\r  step {step:3d}/{steps}  loss {loss:.4f}", end="", flush=True)
            elif step == 1 or step % 10 == 0:
                print(f"  step {step:3d}/{steps}  loss {loss:.4f}", flush=True)
    if sys.stdout.isatty():
        print()
    if trainer.returncode:
        print("".join((folder / "trainer.log").read_text().splitlines(keepends=True)[-60:]))
        raise SystemExit(f"verl's trainer failed with exit status {trainer.returncode}; log: {folder / 'trainer.log'}")
    return seen


def rank_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the overlay's report of every rank, in the order of the ranks."""
    reports = [json.loads(file.read_text()) for file in (folder / "reports").glob("*.json")]
    ranks = [r for r in reports if r["process"]["rank"] is not None and r["phase"]["counts"]]
    return sorted(ranks, key=lambda r: int(r["process"]["rank"]))


def never_called(report: dict[str, Any]) -> list[str]:
    """Return the required hooks that were installed in this rank and never called.

    Left out are those on engines that do not run, on adapters that are merged (the demo has none), and on verl's look
    at trainer.device: 0.7.0's SFT trainer has none.
    """
    idle = {h["name"] for h in report["hooks"] if h["required"] and h["state"] == "installed" and not h["calls"]}
    no_use = {name for name in idle if name.startswith("engine.initialize.")} - {"engine.initialize.fsdp"}
    no_use |= {"engine.merged_adapters"} | ({"chip.configured_device"} if version("verl") == "0.7.0" else set())
    return sorted(idle - no_use)


def disk(folder: Path) -> str:
    """Return how much disk a folder takes, in words; a file with several names in it counts once."""
    files = {(found.st_dev, found.st_ino): found.st_blocks * 512 for found in map(os.lstat, folder.rglob("*"))}
    taken = sum(files.values())
    return f"{taken / 1e9:.1f} GB" if taken >= 1e8 else f"{taken / 1e6:.1f} MB"


def recipe(script: str, folder: Path, **files: str) -> str:
    """Return the command that runs a recipe with the demo's model, and with files of its folder in these variables."""
    here, beside = os.path.relpath(folder), os.path.relpath(Path(__file__).parent)
    data = " ".join(f"{name}={here}/{file}" for name, file in files.items())
    return f"MODEL={here}/model {data} bash {beside}/recipes/{script}"


def end(reports: list[dict[str, Any]], faults: list[str], process: str, folder: Path, own: str) -> int:
    """Print what the hooks did in each ``process``, every fault, where things lie and what to do next.

    ``own`` is the command that trains the reader's own model.  Return the exit status.
    """
    for report in reports:
        installed = [h for h in report["hooks"] if h["state"] == "installed"]
        called = sum(1 for h in installed if h["calls"])
        calls = sum(h["calls"] for h in installed)
        name = f"{process} {report['process']['rank']}"
        print(f"  {name:<12}{len(installed)} hooks installed, {called} called, {calls} calls")
    for fault in faults:
        print(f"  FAULT       {fault}")
    environment = Path(sys.prefix)
    here, python = os.path.relpath(folder), os.path.relpath(sys.executable)
    print(f"  log         {here}/trainer.log")
    print(f"  reports     {here}/reports, one of each process")
    print(f"  disk        {disk(environment)} in {os.path.relpath(environment)}, {disk(folder)} in {here}")
    print("  FAILED" if faults else "  ok")
    print("Next, what every process did, and a model and data of your own, which docs/training.md explains:")
    print(f"  {python} -m verl_fl_overlay doctor --reports {here}/reports")
    print(f"  {own}")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/sft"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / "reports").glob("*.json"):
        stale.unlink()
    subprocess.run([sys.executable, Path(__file__).with_name("arithmetic.py"), folder], check=True)

    print(f"verl's SFT trainer, {RANKS} ranks, CPU; until its first step it imports for some seconds:")
    begun = time.monotonic()
    loss = train(folder, options.steps)
    seconds = time.monotonic() - begun

    reports = rank_reports(folder)
    faults = []
    if len(loss) != options.steps:
        faults.append(f"{len(loss)} steps instead of {options.steps}")
    elif not sum(loss[-3:]) / 3 < loss[0]:
        faults.append(f"the loss did not fall: {loss[0]:.4f} -> {loss[-1]:.4f}")
    if len(reports) != RANKS:
        faults.append(f"{len(reports)} ranks reported instead of {RANKS}")
    for report in reports:
        missed = never_called(report)
        if missed:
            faults.append(f"rank {report['process']['rank']} never called {', '.join(missed)}")
        faults += report["problems"]

    if reports:
        verl = reports[0]["verl"]
        print(f"  verl        {verl['version']}, shim {verl['shim']}, torch {reports[0]['torch']}")
    print(f"  steps       {len(loss)} in {seconds:.0f} s, start of the processes included")
    if loss:
        print(f"  loss        {loss[0]:.4f} -> {loss[-1]:.4f}")
    here = f"PATH=$PWD/{os.path.relpath(Path(sys.executable).parent)}:$PATH VERL_FL_DEVICE=cpu GPUS={RANKS}"
    own = recipe("sft.sh", folder, DATA="train.parquet", VAL="val.parquet")
    return end(reports, faults, "rank", folder, f"{here} {own}")


if __name__ == "__main__":
    raise SystemExit(main())
