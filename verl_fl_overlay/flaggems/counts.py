"""Counts the calls of each routed kernel, and writes the counts to a file of this process."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_fl_overlay.files import RegularFile, this_process
from verl_fl_overlay.flaggems.library import Kernel


class CallCounts:
    """Counts the calls of kernels.

    The kernels themselves count, when torch's dispatcher calls them.  FlagGems' log shows calls too, but only after
    changes to the level and handlers of a logger that other code shares.
    """

    def __init__(self, path: str) -> None:
        """Write beside ``path``, the value of TRAINING_FLAGGEMS_PATH."""
        self._path = Path(path)
        self._calls: Counter[Kernel] = Counter()
        self._written = 0
        self._file = RegularFile(f"TRAINING_FLAGGEMS_PATH={path}", lambda: self.file, self._text)

    def counting(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Return ``kernels`` with functions that count their calls."""
        return [replace(kernel, function=self._counted(kernel)) for kernel in kernels]

    def _counted(self, kernel: Kernel) -> Callable[..., Any]:
        function, calls = kernel.function, self._calls

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[kernel] += 1
            return function(*args, **kwargs)

        return counted

    @property
    def file(self) -> Path:
        """This process's file; two ranks never share one, nor do two worker groups that both have a rank 0."""
        rank = os.environ.get("RANK", "0")
        return self._path.with_name(f"{self._path.stem}.training.rank{rank}.{this_process()}{self._path.suffix}")

    def write_regularly(self) -> None:
        """Write, unless nothing was called since the last writing, or that was less than a second ago."""
        if self._calls.total() != self._written:
            self._file.write_regularly()

    def write(self) -> None:
        """Write, unless nothing was called since the last writing."""
        if self._calls.total() != self._written:
            self._file.write()

    def _text(self) -> str:
        self._written = self._calls.total()
        rows = sorted(self._calls.items(), key=lambda row: (-row[1], row[0].key))
        lines = (f"{count:>10}  aten::{kernel.key}  {_origin(kernel)}\n" for kernel, count in rows)
        return f"{'calls':>10}  operator  FlagGems function\n" + "".join(lines)


def _origin(kernel: Kernel) -> str:
    return f"{getattr(kernel.function, '__module__', '?')}.{kernel.name}"
