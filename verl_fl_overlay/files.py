"""Files that a process writes again and again while it trains, for others to read at any moment."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("verl_fl_overlay")

INTERVAL = 1.0
"""Least time between two regular writings, seconds."""


def this_process() -> str:
    """Return a name that no other process of the cluster has.  A forked child has its own."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` under another name and move it to ``file``; a reader finds the old file or the complete new one.

    Raises:
        OSError: the folder is not there or cannot be written.
    """
    part = file.with_name(f"{file.name}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error  # a full disk names no file


class RegularFile:
    """A file that is written at most once a second.

    The first time that it cannot be written, one warning is logged; it is tried again, since a full disk gets room.
    """

    def __init__(self, asked_by: str, file: Callable[[], Path], text: Callable[[], str]) -> None:
        """Take the setting that asked for it ("NAME=value"), and the functions that return its place and content."""
        self._asked_by = asked_by
        self._file = file
        self._text = text
        self._last = float("-inf")
        self._warned = False
        self.fault = ""
        """Why it could not be written the last time, "" if it could."""

    def write_regularly(self) -> None:
        """Write, unless the last regular writing was less than ``INTERVAL`` ago."""
        if time.monotonic() - self._last >= INTERVAL:
            self._last = time.monotonic()
            self.write()

    def write(self) -> None:
        """Write now."""
        self.fault = ""  # the text may name it
        try:
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, self._text())
        except OSError as error:
            self.fault = f"{self._asked_by} cannot be written ({error}); training goes on without it"
            if not self._warned:
                self._warned = True
                logger.warning(self.fault)
