"""Programs in a process of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from verl_fl_overlay.settings import TABLE

OVERLAY = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_DEVICE": "cpu"}
"""The environment that loads the overlay on a machine without an accelerator."""

PLAIN = {"VERL_USE_EXTERNAL_PLUGINS": "none"}
"""The environment in which no verl, old or new, loads it."""


def of_the_stack(name: str) -> bool:
    """Tell whether an environment variable is one of verl's, the overlay's or the rest of the stack's."""
    return name.startswith("VERL_") or name in TABLE


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """Return this process's environment less every variable of the stack, with ``extra``."""
    kept = {name: value for name, value in os.environ.items() if not of_the_stack(name)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **extra}


def before_others(*folders: Path) -> dict[str, str]:
    """Return the PYTHONPATH on which ``folders`` come first; what this process finds by it may be verl itself."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))}


def run(
    *command: str | Path, env: dict[str, str], cwd: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run this Python with ``command`` in a clean environment plus ``env``."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=clean_environment(env),
        cwd=cwd or "/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


_warm: list[subprocess.Popen[str]] = []


def warm(
    *command: str | Path, env: dict[str, str], cwd: Path | None = None, timeout: int = 300, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Do what ``run`` does, in a fork of a process that has imported what verl imports before it loads the overlay.

    It is seconds faster, and for programs that import verl first and use no accelerator.  Several ``ranks`` are started
    as torchrun does; if one fails the others are ended.
    """
    if not _warm or _warm[0].poll() is not None:
        server = [sys.executable, str(Path(__file__).with_name("warm.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        _warm[:] = [subprocess.Popen(server, env=clean_environment(PLAIN), cwd="/", text=True, **pipes)]  # type: ignore[call-overload]
    arguments = [*map(str, command)]
    with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
        asked = {"command": arguments, "environment": clean_environment(env), "folder": str(cwd or "/"), "ranks": ranks}
        print(
            json.dumps({**asked, "output": output.name, "errors": errors.name, "seconds": timeout}),
            file=_warm[0].stdin,
            flush=True,
        )
        status = _warm[0].stdout.readline().strip()
        told = [Path(file.name).read_text(errors="replace") for file in (output, errors)]
    assert status, f"the process of tests/warm.py ended, exit status {_warm[0].wait()}"
    if status == "late":
        raise subprocess.TimeoutExpired(arguments, timeout, *told)
    return subprocess.CompletedProcess(arguments, int(status), *told)


def python(code: str, start: Any = run, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program given as text; ``start`` is ``run`` or ``warm``."""
    return start("-c", textwrap.dedent(code), **options)


def output(code: str, **options: Any) -> str:
    """Run a program given as text, fail the test if it fails; return the last line it printed."""
    done = python(code, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip().splitlines()[-1]


def result(*command: str | Path, start: Any = run, **options: Any) -> dict[str, Any]:
    """Run a program that prints RESULT and JSON, fail the test if it fails; return what it printed."""
    done = start(*command, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
