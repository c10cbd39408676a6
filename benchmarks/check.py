"""How long ``verl-fl check`` takes:  python benchmarks/check.py WHEEL [--runs N]

Whole processes, from start to end; then its stages inside one process.  Medians, with the extremes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

STAGES = """
import sys, time
started = time.perf_counter()
from verl_fl_overlay.compat.release import check
from verl_fl_overlay.compat.release import fingerprint
from verl_fl_overlay.compat.release import sources
imported = time.perf_counter()
parsing, parse = 0.0, fingerprint.ast.parse
def timed(*args, **kwargs):
    global parsing
    begin = time.perf_counter()
    try:
        return parse(*args, **kwargs)
    finally:
        parsing += time.perf_counter() - begin
fingerprint.ast.parse = timed
with sources.opened(sys.argv[1]) as tree:
    unpacked = time.perf_counter()
    check.check(tree)
    print(imported - started, unpacked - imported, parsing, time.perf_counter() - unpacked - parsing)
"""


def run(*command: str) -> tuple[str, float]:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip().splitlines()[-1], time.perf_counter() - begin


def row(what: str, seconds: list[float]) -> None:
    print(f"| {what} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    wheel = str(options.wheel.resolve())

    whole = [run("-m", "verl_fl_overlay", "check", wheel)[1] for _ in range(options.runs)]
    stages = [[float(s) for s in run("-c", STAGES, wheel)[0].split()] for _ in range(options.runs)]
    print(f"{options.runs} runs, seconds\n\n| | median | least | most |\n|---|---|---|---|")
    row(f"verl-fl check {options.wheel.name}", whole)
    for number, name in enumerate(("its imports", "unpacking", "parsing", "comparing")):
        row(f"- {name}", [stage[number] for stage in stages])


if __name__ == "__main__":
    main()
