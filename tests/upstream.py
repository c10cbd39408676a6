"""verl's own CPU tests with and without the overlay: every test has to end the same way.

As a program:  python tests/upstream.py [--verl-source TREE] [--only PART] [--limit SECONDS] [--json FILE]

TREE is a source tree of verl with its tests/; without it the tests that the installed wheel brought are run.  Exit
status 0: no difference; 1: a difference, listed; 2: there is nothing to run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from processes import PLAIN, clean_environment

WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}


def outcomes(files: list[Path], root: Path, overlay: bool, limit: float) -> dict[str, str]:
    """Run the test files in one process; return test -> passed, failed, error or skipped.

    A test that takes longer than ``limit`` seconds fails (pytest-timeout ends it).
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        environment = clean_environment({**(WITH if overlay else PLAIN), "PYTHONPATH": str(root)})
        options = ["-q", "-p", "no:cacheprovider", f"--timeout={limit}", f"--junitxml={result}", f"--rootdir={root}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *map(str, files)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if not result.is_file():
            raise SystemExit(f"pytest ended without a result:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return {
            f"{case.get('classname')}::{case.get('name')}": outcome(case)
            for case in ElementTree.parse(result).iter("testcase")
        }


def outcome(case: ElementTree.Element) -> str:
    for kind, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if case.find(kind) is not None:
            return word
    return "passed"


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
    without, with_it = (outcomes(files, root, overlay, options.limit) for overlay in (False, True))
    rows = [
        {"test": test, "without": without.get(test), "with": with_it.get(test)} for test in sorted({*without, *with_it})
    ]
    differences = [row for row in rows if row["without"] != row["with"]]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"tests": rows, "differences": differences}, indent=1) + os.linesep)
    for row in differences:
        print(f"DIFFERENT {row['test']}: {row['without']} without, {row['with']} with")
    counts = {word: sum(row["without"] == word for row in rows) for word in sorted({str(r["without"]) for r in rows})}
    print(f"{len(files)} files, {len(rows)} tests ({counts} without the overlay), {len(differences)} different with it")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
