"""Runs programs in forks of one process, which has imported what verl imports before it loads the overlay.

These are seconds of one core that most tests would pay for each program.  Each line on standard input asks for one
program, in JSON, in as many ranks as it says; the answer is a line with the exit status of the rank that failed first,
or 0, or "late".  What a program imports beyond is its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from types import ModuleType
from typing import Any

import ray  # noqa: F401
import tensordict  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401


def become(asked: dict[str, Any]) -> int:
    """Run the program in this process as if it were started alone; return its exit status."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in ((1, asked["output"]), (2, asked["errors"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    program, *sys.argv = asked["command"] if asked["command"][0] in ("-c", "-m") else ("", *asked["command"])
    beside = {"-c": "", "-m": os.getcwd()}.get(program, os.path.dirname(sys.argv[0]))
    sys.path[0:1] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if program == "-c":
            code, sys.argv[0] = sys.argv[0], "-c"
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        else:
            run = runpy.run_module if program else runpy.run_path
            run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if program else {}))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def places(ranks: int) -> list[dict[str, str]]:
    """Return the variables by which ranks find each other, as torchrun sets them; a program alone has none."""
    if ranks == 1:
        return [{}]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{"OMP_NUM_THREADS": "1", **alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def end_all(children: set[int]) -> None:
    """Kill these processes, and what they started."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def answer(asked: dict[str, Any]) -> str:
    """Run the program and return its exit status."""
    children = set()
    for place in places(asked["ranks"]):
        child = os.fork()
        if not child:
            status = become({**asked, "environment": place | asked["environment"]})
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(child, child)
        children.add(child)
    late, status = [], 0
    signal.signal(signal.SIGALRM, lambda *_: (late.append(True), end_all(children)))
    signal.alarm(asked["seconds"])
    while children:
        child, ended = os.wait()
        children.discard(child)
        if ended and not status:
            status = os.waitstatus_to_exitcode(ended)
            end_all(children)
    signal.alarm(0)
    return "late" if late else str(status)


def main() -> None:
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
