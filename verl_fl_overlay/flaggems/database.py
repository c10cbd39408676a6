"""A tuning database for each process.  FlagGems has one SQLite file per host, and ranks that share it block each other.

The next run uses the same file again, so the tuning results are kept.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from verl_fl_overlay.devices.accelerator import chip_name

VARIABLE = "FLAGGEMS_DB_URL"

_seats: list[int] = []
"""Descriptors of the lock files this process holds; the system releases them when the process ends."""


@contextmanager
def own_database() -> Iterator[bool]:
    """Name a database of this process's own while FlagGems is imported, unless the user has named one.

    FlagGems reads the variable once, at its import.  Afterwards the variable is unset, because a child process would
    inherit it.  Yields whether the database is ours.
    """
    if os.environ.get(VARIABLE):
        yield False
        return
    os.environ[VARIABLE] = f"sqlite:///{_claim(folder())}"
    try:
        yield True
    finally:
        os.environ.pop(VARIABLE, None)


def folder() -> Path:
    """Make and return the folder for what is tuned on this chip with this Triton."""
    root = Path(os.environ.get("FLAGGEMS_CACHE_DIR") or Path.home() / ".flaggems")
    chip = "".join(c if c.isalnum() else "_" for c in chip_name())
    made = root / "config_cache" / "verl_fl" / f"{chip}-triton{_triton_version()}"
    made.mkdir(parents=True, exist_ok=True)
    return made


def _claim(folder: Path) -> Path:
    """Return this rank's file in ``folder``, or the next one that no living process holds.

    The rank alone is not enough: an actor's and a critic's worker group both have a rank 0.
    """
    rank = os.environ.get("RANK", "0")
    for seat in count():
        name = f"rank{rank}" + (f".{seat}" if seat else "")
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks: nothing tells which files are in use, so take a new one
            os.close(descriptor)
            return folder / f"{name}-{os.getpid()}.db"
        _seats.append(descriptor)
        return folder / f"{name}.db"
    raise AssertionError("unreachable: count() does not end")


def _triton_version() -> str:
    for distribution in ("triton", "flagtree", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
