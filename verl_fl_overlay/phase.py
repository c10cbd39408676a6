"""The training phase: on from the first engine that starts to compute until the last one has finished.

verl nests its calls (``train_mini_batch`` enters ``train_mode`` and calls ``train_batch``, which enters it again) and
keeps several engines in one process.  So the phase counts its levels, and there is one phase for the whole process.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from verl_fl_overlay.events import Event


class Phase:
    """A depth-counted, process-wide state with events on its outermost entering and leaving.

    The transitions are serialised: ``entered`` has returned before anything inside the phase runs.
    """

    def __init__(self, name: str) -> None:
        self.entered = Event(f"{name} phase entered")
        self.left = Event(f"{name} phase left")
        self.failed = Event(f"{name} phase failed")
        """Emitted with what was raised inside, at each level that this leaves."""
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._depth = 0

    @property
    def depth(self) -> int:
        """How many levels were entered and not left yet."""
        return self._depth

    @property
    def active(self) -> bool:
        """Whether any thread of this process is inside the phase."""
        return self._depth > 0

    def enter(self, mode: str) -> None:
        """Go one level in; ``mode`` ("train", "eval", "initialize" ...) is counted.

        After each call ``leave`` must be called, even if this raised (a subscriber under VERL_FL_STRICT=1).
        """
        with self._lock:
            self._depth += 1
            self.counts[mode] += 1
            if self._depth == 1:
                self.entered.emit()

    def leave(self) -> None:
        """Go one level out; leaving a phase that is off does nothing."""
        with self._lock:
            if self._depth == 0:
                return
            self._depth -= 1
            if self._depth == 0:
                self.left.emit()

    def forget(self) -> None:
        """Be off and count from zero: without its hooks verl tells of no leaving any more."""
        with self._lock:
            self._depth = 0
            self.counts.clear()

    @contextmanager
    def inside(self, mode: str) -> Iterator[None]:
        """Hold the phase for the length of a ``with`` block, whatever happens in it."""
        try:
            self.enter(mode)
            yield
        except BaseException as error:
            self.failed.emit(error)
            raise
        finally:
            self.leave()


training = Phase("training")
