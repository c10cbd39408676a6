"""Turns between processes of a node: one compiles or tunes, the others wait for what it leaves in the caches.

Without them every rank of a job compiles the same kernels, and times the same tilings, at the same moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl_fl_overlay.devices import accelerator

logger = logging.getLogger("verl_fl_overlay")

LONGEST_WAIT = 300.0
"""Seconds after which a process goes on by itself: a turn may wait for a collective that needs all processes."""

POLL = 0.05
"""Seconds between two looks at a turn that another process has."""


_mine: set[tuple[Path, str]] = set()
"""The turns that this process is in.  The set is the process's, since the system's file locks are: without the set its
own lock would keep it from entering a turn again.
"""


@dataclass
class Turn:
    """The text that the first process left for the others, such as its result; "" in the first process."""

    left: str = ""


@contextmanager
def first_in(folder: Path, what: str) -> Iterator[Turn]:
    """Wait while another process does ``what``, unless one has done it before; then let this one do it.

    The first process may set ``left`` of the yielded ``Turn``, and the others find it there.  If the first process
    raises or ends before it has finished, in whatever way, the next one becomes the first.  If a process asks for the
    same work again inside its own turn, it does it at once.  No collective may happen inside.

    Args:
        folder: where the processes meet; each ``what`` has a file there.
        what: the name of the work, in words: everything that its result depends on.
    """
    try:
        descriptor = _open(folder, what)
    except OSError:  # nowhere to write, so there is no shared cache either
        yield Turn()
        return
    file = (folder, what)
    try:
        mine = file not in _mine and _take(descriptor, what)
        turn = Turn("" if mine else os.pread(descriptor, 1 << 16, 0).decode())
        if not mine:
            yield turn
            return
        _mine.add(file)
        try:
            yield turn
        finally:
            _mine.remove(file)
        with contextlib.suppress(OSError):  # a full disk: the others repeat the work
            os.pwrite(descriptor, (turn.left or "done").encode(), 0)
    finally:
        os.close(descriptor)


def first_to_compile(kernels: str) -> AbstractContextManager[Turn]:
    """Wait while another process fills Triton's cache with ``kernels``; who deletes the cache deletes the turn."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    triton = getattr(sys.modules.get("triton"), "__version__", "")
    chip, overlay = accelerator.chip_name(), sys.modules["verl_fl_overlay"].__version__
    return first_in(folder, f"compiling {kernels} for {chip} with Triton {triton} and overlay {overlay}")


def _open(folder: Path, what: str) -> int:
    folder = folder / "verl_fl_turns"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(what.encode()).hexdigest()[:32]
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _take(descriptor: int, what: str) -> bool:
    """Return True with the file locked, False once another process has finished or the wait was too long."""
    begun, said = time.monotonic(), False
    while not os.fstat(descriptor).st_size:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                logger.info("waiting for another process of this node: %s", what)
                said = True
            if time.monotonic() - begun > LONGEST_WAIT:
                logger.warning("another process takes more than %.0f s, not waited for: %s", LONGEST_WAIT, what)
                return False
            time.sleep(POLL)
        except OSError:  # a file system without locks
            return False
        else:
            if not os.fstat(descriptor).st_size:
                return True
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
