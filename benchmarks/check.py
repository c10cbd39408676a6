"""How long ``verl-fl check`` takes, and what loading the overlay costs:  python benchmarks/check.py WHEEL [--runs N]

check: whole processes, from start to end; then its stages inside one process.  Loading: in processes that have
imported verl without the overlay, the time of importing it, which activates it, and installs and verifies every hook
whose module is there (VERL_FL_DEVICE=cpu, so that all features are on).  Medians, with the extremes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STAGES = """
import sys, time
started = time.perf_counter()
from verl_fl_overlay.compat import check, fingerprint, sources
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

LOADING = """
import sys, time
import verl, verl.workers.engine.base, verl.utils.model
assert "verl_fl_overlay" not in sys.modules
begin = time.perf_counter()
import verl_fl_overlay
end = time.perf_counter()
from verl_fl_overlay import activation
states = [status.state.value for status in activation.active().hooks.report()]
print(end - begin, states.count("installed"), len(states))
"""


def run(*command: str) -> tuple[str, float]:
    plain = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_FL_DEVICE": "cpu", "PYTHONWARNINGS": "ignore"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env={**environment, **plain}, capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip().splitlines()[-1], time.perf_counter() - begin


def row(what: str, seconds: list[float]) -> None:
    print(f"| {what} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-loading", action="store_true", help="without verl installed: only check")
    options = parser.parse_args()
    wheel = str(options.wheel.resolve())

    whole = [run("-m", "verl_fl_overlay", "check", wheel)[1] for _ in range(options.runs)]
    stages = [[float(s) for s in run("-c", STAGES, wheel)[0].split()] for _ in range(options.runs)]
    print(f"{options.runs} runs, seconds\n\n| | median | least | most |\n|---|---|---|---|")
    row(f"verl-fl check {options.wheel.name}", whole)
    for number, name in enumerate(("its imports", "unpacking", "parsing", "comparing")):
        row(f"- {name}", [stage[number] for stage in stages])
    if not options.no_loading:
        loads = [run("-c", LOADING)[0].split() for _ in range(options.runs)]
        row(f"loading the overlay ({loads[0][1]} of {loads[0][2]} hooks installed)", [float(load[0]) for load in loads])


if __name__ == "__main__":
    main()
