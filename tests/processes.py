"""Programs in a process of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program given as text."""
    return run("-c", textwrap.dedent(code), **options)  # type: ignore[arg-type]


def output(code: str, **options: object) -> str:
    """Run a program given as text, fail the test if it fails; return the last line it printed."""
    done = python(code, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip().splitlines()[-1]


def result(*command: str | Path, **options: Any) -> dict[str, Any]:
    """Run a program that prints RESULT and JSON, fail the test if it fails; return what it printed."""
    done = run(*command, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
