"""A folder that one program uses at a time."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path
from typing import IO


def locked(folder: Path, who: str) -> IO[str]:
    """Return the file whose lock says that the folder is in use, for as long as it, or a process that has it, is open.

    A file system may have no locks.

    Raises:
        SystemExit: another process has it; ``who`` that may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder} is in use by {who}: name another --folder, or wait") from None
    return lock
