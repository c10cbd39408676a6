"""Install this bundle into the Python that runs it: ``python install.py``; no network is used.

It stops before it changes anything if a file is not as it was when the bundle was made, or if this Python, this
machine or its torch is not the one that the bundle is for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE / "repository" / "out" / "arithmetic"


def wrong(manifest: dict[str, Any]) -> list[str]:
    """Return what speaks against installing this bundle here."""
    found = []
    there = {"python": ".".join(platform.python_version_tuple()[:2]), "machine": platform.machine()}
    if not manifest["brings torch"]:
        try:
            there["torch"] = importlib.metadata.version("torch").partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            there["torch"] = "none"
    for name, version in there.items():
        if manifest[name] != version:
            found.append(f"it was made for {name} {manifest[name]}, and here is {version}")
    for name, digest in manifest["sha256"].items():
        file = HERE / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            found.append(f"{name} is not as it was when the bundle was made: copy it again")
    return found


def tiny_model() -> int:
    """Make the tiny model and its data, whole or not at all, since other machines may do so now; return the status."""
    program = HERE / "repository" / "examples" / "arithmetic.py"
    new = DATA.with_name(f".{platform.node()}-{os.getpid()}")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        print(f"no tiny model was made: {error}; make it elsewhere: python {program} FOLDER")
        return 0
    try:
        environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
        made = subprocess.run([sys.executable, str(program), str(new)], check=False, env=environment)
        if made.returncode:
            return made.returncode
        try:
            new.rename(DATA)
        except OSError:
            if not DATA.exists():  # no other machine was first
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"a tiny model and its data are in {DATA}")
    return 0


def main() -> int:
    """Install; return the exit status."""
    try:
        manifest = json.loads((HERE / "MANIFEST.json").read_text())
    except FileNotFoundError:
        raise SystemExit(f"{HERE} has no MANIFEST.json: it is no whole bundle; copy it again") from None
    if found := wrong(manifest):
        raise SystemExit("\n".join(["nothing was installed:", *found]))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(HERE / "wheels")]
    done = subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=False)
    if done.returncode:
        return done.returncode
    if not DATA.exists() and (status := tiny_model()):
        return status
    print("installed; next: export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay; python -m verl_fl_overlay doctor")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
