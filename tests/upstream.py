"""verl's own CPU tests with and without the overlay: every test has to end the same way, or be mended by it.

As a program:  python tests/upstream.py [--verl-source TREE] [--only PART] [--limit SECONDS] [--json FILE]

TREE is a source tree of verl with its tests/; without it the tests that the installed wheel brought are run.  Exit
status 0: no difference; 1: a difference, listed; 2: there is nothing to run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from processes import PLAIN, clean_environment

WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}


def outcomes(files: list[Path], root: Path, overlay: bool, limit: float) -> dict[str, str]:
    """Run the files in one process, as verl does; return ``file::test`` -> passed, skipped, or failed and of what.

    A test may take ``limit`` seconds (pytest-timeout ends it), all of them that for each file.  Files that end the
    process, or do not end, are found by running each alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        environment = clean_environment({**(WITH if overlay else PLAIN), "PYTHONPATH": str(root)})
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--asyncio-mode=auto",
            "--continue-on-collection-errors",
            "-o",
            "junit_family=xunit1",
        ]
        command = [*options, f"--timeout={limit}", f"--junitxml={result}", f"--rootdir={root}", *map(str, files)]
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", *command],
            env=environment,
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit * len(files))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a test left running
        if result.is_file():
            cases = ElementTree.parse(result).iter("testcase")
            return {f"{c.get('file')}::{c.get('classname')}::{c.get('name')}": outcome(c) for c in cases}
    if len(files) == 1:
        return {files[0].relative_to(root).as_posix(): "no result"}
    alone = (outcomes([file], root, overlay, limit) for file in files)
    return {test: word for of_file in alone for test, word in of_file.items()}


def compared(files: list[Path], root: Path, limit: float) -> list[dict[str, str | None]]:
    """Return a row for each test of the files: how it ended without and with the overlay."""
    without, with_it = (outcomes(files, root, overlay, limit) for overlay in (False, True))
    return [{"test": t, "without": without.get(t), "with": with_it.get(t)} for t in sorted({*without, *with_it})]


def different(rows: list[dict[str, str | None]]) -> list[dict[str, str | None]]:
    return [row for row in rows if row["without"] != row["with"]]


def outcome(case: ElementTree.Element) -> str:
    for kind, word in (("failure", "failed"), ("error", "error")):
        if (found := case.find(kind)) is not None:
            errors = re.findall(r"^E +([\w.]+(?:Error|Exception|Exit|Timeout)\b)", found.text or "", re.MULTILINE)
            return f"{word}: {errors[-1] if errors else found.get('message', '')[:60]}"
    return "passed" if case.find("skipped") is None else "skipped"


def find_tests(source: Path | None) -> Path:
    """Return the folder in which ``tests/`` (and for a tree ``verl/``) lies."""
    if source is not None:
        return source.resolve()
    return Path(str(importlib.metadata.distribution("verl").locate_file("")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl-source", type=Path, help="a source tree; default: the installed wheel's tests")
    parser.add_argument("--only", default="", help="run only the files whose path contains this")
    parser.add_argument("--limit", type=float, default=120, help="seconds a test may take (default 120)")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    options = parser.parse_args()

    root = find_tests(options.verl_source)
    files = [f for f in sorted((root / "tests").rglob("*_on_cpu.py")) if options.only in f.relative_to(root).as_posix()]
    if not files:
        print(f"no *_on_cpu.py tests under {root}/tests", file=sys.stderr)
        return 2
    rows = compared(files, root, options.limit)
    # A test that waits for Ray may fail by the machine's load: a difference has to be there again with its file alone.
    again = sorted({str(row["test"]).partition("::")[0] for row in different(rows)})
    differences = [row for file in again for row in different(compared([root / file], root, options.limit))]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"tests": rows, "repeated": again, "differences": differences}, indent=1) + os.linesep
        )
    mended = [row for row in differences if row["with"] == "passed"]
    for row in differences:
        word = "MENDED" if row in mended else "DIFFERENT"
        print(f"{word} {row['test']}: {row['without']} without, {row['with']} with")
    counts = Counter(str(row["without"]).partition(":")[0] for row in rows)
    said = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
    print(
        f"{len(files)} files, {len(rows)} tests ({said} without the overlay); "
        f"with it {len(mended)} mended, {len(differences) - len(mended)} different"
    )
    return int(differences != mended)


if __name__ == "__main__":
    raise SystemExit(main())
