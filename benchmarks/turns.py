"""The reward of a run of grpo.py, which waits with its step until it is this run's turn to use the GPU.

Rows that start one after the other would be compared hours of a noisy host apart, and each start takes minutes.  So all
start at once, and each waits here, in the first answer's reward of a step, for the file that says it may go on.
Environment: TURNS_FOLDER, TURNS_RUN (its name), TURNS_ANSWERS (in a step), TURNS_STEPS (of a turn; 0: never wait), and
TURNS_PROCESS, that of grpo.py: a run that waits for one which was killed would hold the GPU's memory forever.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from arithmetic import reward as judged

WAIT = 0.05
"""Seconds between two looks for the file."""


class Turns:
    """Counts the answers of the one process that judges them all, in threads."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["TURNS_FOLDER"])
        self.run = os.environ["TURNS_RUN"]
        self.answers = int(os.environ["TURNS_ANSWERS"])
        self.steps = int(os.environ["TURNS_STEPS"])
        self.process = Path("/proc", os.environ["TURNS_PROCESS"])
        self.seen = 0
        self.first = 0.0
        self.lock = threading.Lock()

    def answer(self) -> None:
        """Count one answer; wait if it is the first of a turn."""
        with self.lock:
            step, number = divmod(self.seen, self.answers)
            self.seen += 1
            if number == 0:
                self.first = time.time()
                if self.steps and step % self.steps == 0:
                    self.wait(step // self.steps)
            if number == self.answers - 1:
                with open(self.folder / f"{self.run}.answers", "a") as file:
                    file.write(f"{step + 1} {time.time() - self.first:.3f}\n")

    def wait(self, turn: int) -> None:
        (self.folder / f"{self.run}.waits-{turn}").touch()
        go = self.folder / f"{self.run}.goes-{turn}"
        while not go.exists():
            if not self.process.exists():
                raise RuntimeError("grpo.py has ended, and nobody says when it is this run's turn")
            time.sleep(WAIT)


turns = Turns() if "TURNS_FOLDER" in os.environ else None


def reward(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any) -> float:
    """Return what ``arithmetic.reward`` does, when it is this run's turn."""
    assert turns is not None, "grpo.py sets TURNS_FOLDER"
    turns.answer()
    return judged(data_source, solution_str, ground_truth, extra_info)
