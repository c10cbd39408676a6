"""What the overlay adds to ``import verl``: pairs of fresh processes, with and without it, in turn.

python benchmarks/load.py [--pairs 10]: prints medians; the difference is what every Ray process pays.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

PROGRAM = """
import time, sys
begun = time.perf_counter()
import verl
print(time.perf_counter() - begun)
"""
# Importing verl takes seconds and varies by more than the overlay costs, so the overlay alone is timed in its process.
ALONE = """
import time, verl
begun = time.perf_counter()
import verl_fl_overlay
print(time.perf_counter() - begun)
"""


def seconds(program: str, **variables: str) -> float:
    """Run ``program`` in a fresh process; return the seconds it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**kept, "VERL_USE_EXTERNAL_PLUGINS": "none", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    pairs = parser.parse_args().pairs
    overlay = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_DEVICE": "cpu"}
    seconds(PROGRAM, **overlay)
    without, with_overlay, alone = [], [], []
    for _ in range(pairs):
        without.append(seconds(PROGRAM))
        with_overlay.append(seconds(PROGRAM, **overlay))
        alone.append(seconds(ALONE, VERL_FL_DEVICE="cpu"))
    differences = [b - a for a, b in zip(without, with_overlay, strict=True)]
    print(f"import verl                     {statistics.median(without) * 1e3:8.1f} ms  (median of {pairs})")
    print(f"import verl with the overlay    {statistics.median(with_overlay) * 1e3:8.1f} ms")
    print(f"  difference of the pairs       {statistics.median(differences) * 1e3:8.1f} ms")
    print(f"the overlay itself, verl loaded {statistics.median(alone) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
