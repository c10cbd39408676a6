"""Finds the operators that make a step faster: runs whole steps with and without FlagGems' operators, in turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from verl_fl_overlay.flaggems import safety
from verl_fl_overlay.flaggems.library import FlagGems, Kernel
from verl_fl_overlay.flaggems.routing import Router
from verl_fl_overlay.flaggems.tuning import timing
from verl_fl_overlay.flaggems.tuning.calls import Step

ROUNDS = 5
"""Turns of each side; by chance alone the new side is faster in all of them once in 32 times."""

Say = Callable[[str], None]


@contextlib.contextmanager
def routed(kernels: Iterable[Kernel]) -> Iterator[None]:
    """Let ``kernels`` compute their operators for the length of a ``with`` block, registered as in training."""
    router = Router([safety.seen_by_autograd(kernel) for kernel in kernels])
    router.enter()
    try:
        yield
    finally:
        router.leave()


class Contest:
    """Compares sets of FlagGems' functions, given by name, by the time of whole steps."""

    def __init__(self, step: Step, gems: FlagGems, say: Say) -> None:
        self._step = step
        self._kernels = [kernel for kernel in gems.kernels if not safety.why_unsafe(kernel)]
        self._say = say

    def winners(self, kept: list[str], candidates: list[str]) -> list[str]:
        """Return ``kept`` and the ``candidates`` that make steps faster; tries all together, then each half in turn."""
        if not candidates or self._faster(kept, [*kept, *candidates]):
            return [*kept, *candidates]
        if len(candidates) == 1:
            return kept
        half = len(candidates) // 2
        return self.winners(self.winners(kept, candidates[:half]), candidates[half:])

    def times(self, names: Sequence[str]) -> tuple[float, float]:
        """Return the median times of a step, native and with ``names``, milliseconds."""
        native, ours = zip(*(self._round([], names) for _ in range(ROUNDS)), strict=True)
        times = statistics.median(native), statistics.median(ours)
        self._say(f"whole step, native: {times[0]:.1f} ms; with {', '.join(names)}: {times[1]:.1f} ms")
        return times

    def step_ms(self, names: Sequence[str]) -> float:
        """Return the time of a step with ``names`` routed, milliseconds; infinite if a kernel fails in it."""
        try:
            with routed(kernel for kernel in self._kernels if kernel.name in names):
                return timing.step_ms(self._step)
        except Exception as error:  # a kernel may raise anything at a shape that was not timed
            if not names:
                raise
            self._say(f"whole step with {', '.join(names)}: {type(error).__name__}: {str(error)[:80]}")
            return float("inf")

    def _round(self, before: Sequence[str], after: Sequence[str]) -> tuple[float, float]:
        return self.step_ms(before), self.step_ms(after)

    def _faster(self, before: Sequence[str], after: Sequence[str]) -> bool:
        """Tell whether ``after`` wins every round; the first round that it loses ends the contest."""
        for number in range(1, ROUNDS + 1):
            one, other = self._round(before, after)
            if not other < one:
                lost = f"round {number} is lost, {other:.1f} ms against {one:.1f}"
                self._say(f"whole step with {', '.join(after)}: {lost}")
                return False
        return True
