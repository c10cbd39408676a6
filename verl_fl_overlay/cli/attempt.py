"""A function in a process of its own: what it returns, or in one line why it did not.

A component may raise when it is imported, end the interpreter, crash it, or hang; here it can do that to nobody else.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any

from verl_fl_overlay.errors import OverlayError

LONGEST = 400
"""Characters of a reason that are shown."""


@dataclass(frozen=True)
class Result:
    """What the function returned, and "" or why it did not; ``ended`` tells whether its process crashed, hung or left.

    A process of training would do the same; from an error that is only raised it might go on.
    """

    told: dict[str, Any]
    fault: str = ""
    ended: bool = False


@dataclass(frozen=True)
class Attempt:
    """A process that calls one function, and the files to which it writes its answer and its output."""

    process: subprocess.Popen[bytes]
    answer: IO[bytes]
    said: IO[bytes]
    begun: float

    def result(self, limit: float) -> Result:
        """Wait until ``limit`` seconds after the start."""
        try:
            status = self.process.wait(max(0.0, limit - (time.monotonic() - self.begun)))
        except subprocess.TimeoutExpired:
            return Result({}, f"it did not end within {limit:g} s; --timeout waits longer", ended=True)
        answer = _text(self.answer)
        if answer:
            return Result(**json.loads(answer))
        how = f"crashes: {signal.Signals(-status).name}" if status < 0 else f"ends with status {status}"
        last = _text(self.said).strip().splitlines()[-1:]
        return Result({}, one_line(". ".join([f"a process that imports it {how}", *last])), ended=True)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextmanager
def attempt(function: Callable[[], dict[str, Any]]) -> Iterator[Attempt]:
    """Call ``function``, which takes nothing and returns JSON's types; its process ends with the ``with`` block."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        named = f"{function.__module__}:{function.__name__}"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, named, str(answer.fileno())],
            pass_fds=(answer.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            yield Attempt(process, answer, said, time.monotonic())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                process.wait()


def one_line(text: str) -> str:
    """Return ``text`` without line breaks and the last full stop, and not long."""
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def reason(error: BaseException) -> str:
    """Return why something failed: what was raised, in one line."""
    if isinstance(error, OverlayError):
        return one_line(str(error))
    if isinstance(error, SystemExit):
        return one_line(f"it ends the interpreter (SystemExit: {error})")
    return one_line(f"{type(error).__name__}: {error}")


def _run(function: str, answer: int) -> None:
    module, _, name = function.partition(":")
    try:
        result = Result(getattr(importlib.import_module(module), name)())
    except BaseException as error:
        result = Result({}, reason(error), ended=not isinstance(error, Exception))
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(asdict(result), file)
    os._exit(0)  # threads and exit functions that a component left could hang or crash now


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]))
