"""Recipes of examples/ run with a ``python`` that writes down what it is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from processes import of_the_stack

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
PYTHON = """#!/usr/bin/env bash
[[ $1 != -c ]] || { echo "$MISSING"; exit; }  # which modules are not here
[[ $2 != verl_fl_overlay ]] || exit "${DOCTOR:-0}"
printf '%s\\0' "$VERL_USE_EXTERNAL_MODULES" "$VERL_FL_REPORT_DIR" "$@" >"$ASKED"
exit "${TRAINING:-0}"
"""


class Place:
    """A folder like a clone in which ``python examples/arithmetic.py out/arithmetic`` was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("out/arithmetic/model/config.json", "examples/arithmetic.py", "bin/python"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(PYTHON if name.startswith("bin") else "")
        (folder / "bin" / "python").chmod(0o755)
        for name in ("problems", "train", "val"):
            (folder / "out" / "arithmetic" / f"{name}.parquet").touch()

    def bash(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run bash there, with these variables and none of the stack's."""
        kept = {name: value for name, value in os.environ.items() if not of_the_stack(name)}
        here = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "ASKED": str(self.folder / "asked")}
        command = ["/bin/bash", *map(str, arguments)]
        environment = {**kept, **here, **variables}
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)

    def asked(self) -> list[str]:
        """Return the overlay's two variables, and the arguments of the python that was to train."""
        return (self.folder / "asked").read_text().split("\0")[:-1]
