"""What was really called: counts for each kernel, written to a file of this process's own."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_fl_overlay.flaggems.library import Kernel

logger = logging.getLogger("verl_fl_overlay")

INTERVAL = 1.0
"""Least time between two writings, seconds."""


class Record:
    """Counts the calls of kernels and writes them to ``file_of(path)``.

    The counts come from the dispatcher's calls themselves and not from FlagGems' log, whose level and handlers would
    have to be changed for it, in every process that shares the logger.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._calls: Counter[Kernel] = Counter()
        self._last = float("-inf")
        self._written = 0
        self._broken = False

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
        """This process's file: of two ranks, and of two worker groups that both have a rank 0, none share one."""
        path = Path(self._path)
        rank = os.environ.get("RANK", "0")
        return path.with_name(f"{path.stem}.training.rank{rank}.{socket.gethostname()}-{os.getpid()}{path.suffix}")

    def write_regularly(self) -> None:
        """Write, unless nothing was called since the last time or that was less than ``INTERVAL`` ago."""
        if time.monotonic() - self._last >= INTERVAL:
            self.write()

    def write(self) -> None:
        """Write the file whole or not at all; one that cannot be written is warned about once."""
        total = sum(self._calls.values())
        if self._broken or total == self._written:
            return
        self._last = time.monotonic()
        rows = sorted(self._calls.items(), key=lambda row: (-row[1], row[0].key))
        text = "".join(f"{count:>10}  aten::{kernel.key}  {_origin(kernel)}\n" for kernel, count in rows)
        file = self.file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.tmp")
            partial.write_text(f"{'calls':>10}  operator  FlagGems function\n{text}", encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            self._broken = True
            logger.warning("TRAINING_FLAGGEMS_PATH=%s cannot be written (%s); training goes on", self._path, error)
        self._written = total


def _origin(kernel: Kernel) -> str:
    return f"{getattr(kernel.function, '__module__', '?')}.{kernel.name}"
