"""Training on a machine without an accelerator (VERL_FL_DEVICE=cpu)."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.features.feature import Feature


class Cpu(Feature):
    """Makes what verl asks for an accelerator fit a CPU."""

    def start(self) -> None:
        """Answer what a process group and Ray's workers need on a CPU."""
        self.undo.callback(events.group_backend.answer(without_repeated_pairs))
        self.undo.callback(events.enough_cpus.answer(refuse_too_few))


def without_repeated_pairs(backend: Any) -> Any:
    """Drop repeated device:backend pairs, which torch refuses: "cpu:gloo,cpu:gloo" -> "cpu:gloo"."""
    return ",".join(dict.fromkeys(backend.split(","))) if isinstance(backend, str) else backend


def refuse_too_few(free: float, needed: int, way_on: str) -> None:
    """Raise if Ray has fewer free CPUs than workers to start; each worker takes one CPU.

    Raises:
        OverlayError: says how many CPUs there are, and what to do.
    """
    if free < needed:
        raise OverlayError(
            f"the training workers need {needed} CPUs of the Ray cluster, one each, and {free:g} are free; a placement "
            f"group would wait for ever. {way_on}"
        )
