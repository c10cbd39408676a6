"""A tuning database for each process.  FlagGems has one SQLite file per host, and ranks that share it block each other.

The next run uses the same file again, so the tuning results are kept.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from verl_fl_overlay import packages
from verl_fl_overlay.devices.accelerator import chip_name

logger = logging.getLogger("verl_fl_overlay")

VARIABLE = "FLAGGEMS_DB_URL"

_seats: list[int] = []
"""Descriptors of the lock files this process holds; the system releases them when the process ends."""


def give_each_process_its_own() -> None:
    """Give FlagGems a database of this process's own, whoever imports it and when, unless the user has named one.

    FlagGems prepares its database while it is imported, and connects when it tunes for the first time.  The file is
    exchanged at that connection: only then is it certain that the process has chosen its device, whose name decides.
    """
    wrapt.when_imported("flag_gems.utils.libentry")(_exchange)


def _exchange(libentry: ModuleType) -> None:
    model: Any = getattr(getattr(libentry, "libcache", None), "model", None)
    pool = getattr(model, "engine", None)
    users_own = getattr(libentry, VARIABLE, None)  # as FlagGems read it
    if pool is None or users_own or model.sql_model_pool:  # or it has results of this process already
        return
    from sqlalchemy import event

    if not event.contains(pool, "do_connect", _connect):
        event.listen(pool, "do_connect", _connect)
        pool.dispose()


def _connect(dialect: Any, record: Any, arguments: list[Any], named: dict[str, Any]) -> None:
    try:
        arguments[0] = str(_file_of(os.getpid()))
    except OSError as error:
        logger.warning("no tuning database of this process's own (%s): it uses FlagGems', as others do", error)


@functools.cache
def _file_of(process: int) -> Path:
    """Return the file of this process; a forked child needs another one than its parent."""
    return _claim(folder())


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
    return next(filter(None, map(packages.version, ("triton", "flagtree", "pytorch-triton"))), "none")
