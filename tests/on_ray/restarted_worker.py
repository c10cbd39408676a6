"""A Ray worker that trains with verl's real engine, is killed in the middle of a step and restarted by Ray.

Prints JSON: what the worker said before and after.
``PYTHONPATH=tests python tests/on_ray/restarted_worker.py MODEL FOLDER``
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray


class Trainer:
    """Holds a real FSDP2 engine; verl is imported here, in the worker's process."""

    def __init__(self, model: str) -> None:
        import real_engine
        import torch
        import verl  # noqa: F401

        torch.manual_seed(0)
        torch.set_num_threads(1)
        real_engine.join_group(plain=False)
        self.engine = real_engine.make_engine(model, "fsdp2", "lm")

    def train(self) -> dict[str, Any]:
        """Train two steps; return process, losses and the overlay's report."""
        from real_engine import train

        from verl_fl_overlay.activation import report as build

        losses = [step["loss"].hex() for step in train(self.engine, "lm", 2)]
        return {"pid": os.getpid(), "losses": losses, "report": build()}

    def hang(self, marker: str) -> None:
        """Begin a step and stay in it, once ``marker`` says whether the phase is on."""
        from real_engine import make_batch

        from verl_fl_overlay.phase import training

        def loss(**inputs: Any) -> Any:
            Path(marker).write_text(str(training.active))
            time.sleep(600)

        with self.engine.train_mode():
            self.engine.train_batch(make_batch(), loss_function=loss)


def main() -> None:
    model, folder = sys.argv[1:]
    marker = Path(folder) / "in_step"
    ray.init(num_cpus=2, include_dashboard=False)
    trainer = ray.remote(Trainer).options(max_restarts=1, num_cpus=1).remote(model)
    before = ray.get(trainer.train.remote(), timeout=200)
    hanging = trainer.hang.remote(str(marker))
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    in_step = marker.read_text()
    os.kill(before["pid"], signal.SIGKILL)
    try:
        ray.get(hanging, timeout=60)
        killed = "no error"
    except ray.exceptions.RayActorError as error:
        killed = type(error).__name__
    after = ray.get(trainer.train.options(max_task_retries=-1).remote(), timeout=200)
    print("RESULT " + json.dumps({"before": before, "in_step": in_step, "killed": killed, "after": after}))
    ray.shutdown()


if __name__ == "__main__":
    main()
