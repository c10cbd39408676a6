"""verl 0.9.1's main_ppo on the demo's rollout, with batches so small that a step takes three seconds.

``Training`` is watched by its output and its processes: a test does something to it in mid-step and sees how it ends.
As a program it trains: ``python tests/on_ray/ppo.py FOLDER STEPS [SETTING ...]``.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import grpo
import psutil
from processes import clean_environment

ARITHMETIC = Path(__file__).resolve().parents[2] / "examples" / "arithmetic.py"
SMALL = (
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
)
START = 600
"""Until its first step a training may take so long, seconds: a dozen processes import torch and verl."""

STEP = re.compile(r"\bstep:(\d+) - ")


def command(folder: Path, steps: int, *more: str) -> list[str]:
    """Return the command that trains in ``folder``, where arithmetic.py's model and problems lie."""
    return [sys.executable, "-m", "verl.trainer.main_ppo", *grpo.trainer_arguments(folder, steps), *SMALL, *more]


class Training:
    """One run of main_ppo."""

    def __init__(self, folder: Path, steps: int, *more: str, environment: dict[str, str] | None = None) -> None:
        """Start it; ``more`` are verl's settings, ``environment`` goes over the demo's."""
        self.lines: list[str] = []
        self.metrics: dict[int, dict[str, float]] = {}
        """Step -> what verl's console logger printed."""
        self._seen = threading.Condition()
        self._main = psutil.Popen(
            command(folder, steps, *more),
            env=clean_environment({**grpo.environment(folder), **(environment or {})}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._known: list[psutil.Process] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._main.stdout:
            with self._seen:
                self.lines.append(line)
                match = STEP.search(line)
                if match:
                    self.metrics[int(match[1])] = numbers(line)
                self._seen.notify_all()

    def wait_for_step(self, step: int, seconds: float = START) -> None:
        """Wait until this step was logged; fail if training ended or this takes longer."""
        with self._seen:
            deadline = time.monotonic() + seconds
            while step not in self.metrics:
                self._seen.wait(1)
                assert self._main.poll() is None, f"ended before step {step}\n{self.log()}"
                assert time.monotonic() < deadline, f"no step {step} in {seconds} s\n{self.log()}"

    def process(self, title: str, seconds: float = 60) -> psutil.Process:
        """Wait for a process whose command begins with ``title``, or whose program is called so, and return it.

        Ray writes what an actor does into its title: "ray::WorkerDict.actor_rollout_update_actor".
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in self._below():
                word = first_word(process)
                if word.startswith(title) or Path(word).name == title:
                    return process
            time.sleep(0.02)
        raise AssertionError(f"no process {title} in {seconds} s; there are {[first_word(p) for p in self._below()]}")

    def _below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            self._known += [p for p in self._main.children(recursive=True) if p not in self._known]
        return [p for p in self._known if p.is_running()]

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, None if it has not ended by then; end all that is left of it."""
        self._below()
        try:
            return self._main.wait(seconds)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            return None
        finally:
            self.end()

    def end(self) -> None:
        """End all that is left of it."""
        left = [*self._below(), self._main]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def log(self, last: int = 80) -> str:
        return "".join(self.lines[-last:])


def first_word(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""


def numbers(line: str) -> dict[str, float]:
    """Return the metrics in a line of verl's console logger."""
    pairs = re.findall(r"([\w/\-@().]+):(?:np\.float\w+\()?([-+.\deE]+|nan|inf)", line)
    return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def training(*arguments: Any, **options: Any) -> Iterator[Training]:
    run = Training(*arguments, **options)
    try:
        yield run
    finally:
        run.end()


def main() -> None:
    folder, steps, *more = sys.argv[1:]
    place = Path(folder).resolve()
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ARITHMETIC, place], check=True)
    line = command(place, int(steps), *more)
    os.chdir(place)
    os.execve(line[0], line, clean_environment(grpo.environment(place)))


if __name__ == "__main__":
    main()
