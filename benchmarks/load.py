"""What loading the overlay costs: pairs of fresh processes, without and with it, in turn; by what is asked of it.

python benchmarks/load.py [--pairs 10]: every process imports verl and all modules that have hooks and can be imported
here.  "alone" is the import of the overlay after that, with every such hook put on at once: the difference of a pair
varies with the seconds that verl takes, this does not.  Every Ray process pays it once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from verl_fl_overlay import compat

CASES = {
    "nothing": {},
    "CPU and FlagGems": {"VERL_FL_DEVICE": "cpu", "USE_FLAGGEMS": "1"},
    "FlagCX and FlagGems": {"USE_FLAGCX": "1", "USE_FLAGGEMS": "1"},
}
PLAIN = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": ""}
OVERLAY = {**PLAIN, "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}

PROGRAM = """
import importlib, json, sys, time
begun = time.perf_counter()
for module in sys.argv[2:]:
    try:
        importlib.import_module(module)
    except ImportError:
        assert module != "verl"
taken = time.perf_counter() - begun
if sys.argv[1] == "alone":
    assert "verl_fl_overlay" not in sys.modules
    begun = time.perf_counter()
    import verl_fl_overlay
    taken = time.perf_counter() - begun
states = []
if "verl_fl_overlay" in sys.modules:
    from verl_fl_overlay import activation
    states = [status.state.value for status in activation.active().hooks.report()]
print(json.dumps([taken, states.count("installed"), len(states)]))
"""


def run(mode: str, modules: list[str], variables: dict[str, str]) -> tuple[float, int, int]:
    """Run a fresh process; return the seconds it took, the hooks it installed and how many there are."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "USE_FLAG", "TRAINING_"))}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, mode, *modules]
    done = subprocess.run(
        command, env={**kept, **variables}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    seconds, installed, known = json.loads(done.stdout.splitlines()[-1])
    return seconds, installed, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    pairs = parser.parse_args().pairs
    found = compat.find_verl()
    assert found is not None, "verl is not installed"
    modules = ["verl", *dict.fromkeys(hook.module for hook in compat.select(found).hooks if not hook.needs)]
    print(f"verl {found.version}, {pairs} pairs, ms: median (least)\n")
    print("| asked for | hooks put on | imports, without | difference of a pair, with | the overlay alone |")
    print("| --- | --- | --- | --- | --- |")
    run("whole", modules, OVERLAY)  # writes the bytecode
    for name, variables in CASES.items():
        without, differences, alone = [], [], []
        for _ in range(pairs):
            without.append(run("whole", modules, PLAIN)[0])
            differences.append(run("whole", modules, {**OVERLAY, **variables})[0] - without[-1])
            seconds, installed, known = run("alone", modules, {**PLAIN, **variables})
            alone.append(seconds)
        figures = [f"{statistics.median(s) * 1e3:.1f} ({min(s) * 1e3:.1f})" for s in (without, differences, alone)]
        print(f"| {name} | {installed} of {known} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
