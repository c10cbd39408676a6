"""What loading the overlay costs: python benchmarks/load.py [--pairs 5], on a machine that does nothing else.

First pairs of fresh processes that import verl, without and with the overlay: what every Ray process pays, but verl's
seconds vary by more than that.  So then the overlay alone, in processes that have imported verl and every module with
hooks that can be imported here: all hooks of the features that are asked for are verified and put on at once.  Last the
same in processes that have imported what rollout's do: vLLM and what verl runs in its server and its worker.

Other modules that VERL_USE_EXTERNAL_MODULES names are loaded in every process, with the overlay and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from verl_fl_overlay import compat
from verl_fl_overlay.settings.loading import LOADED_BY, OVERLAY, modules

FEATURES = {
    "nothing": {},
    "the CPU": {"VERL_FL_DEVICE": "cpu"},
    "the CPU, FlagGems": {"VERL_FL_DEVICE": "cpu", "USE_FLAGGEMS": "1"},
    "FlagCX, FlagGems": {"USE_FLAGCX": "1", "USE_FLAGGEMS": "1"},
}
ROLLOUT = {
    "vLLM's server": "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "vLLM's worker": "verl.workers.rollout.vllm_rollout.utils",
}
OTHERS = [module for module in modules(os.environ) if module != OVERLAY]

WHOLE = """
import json, time
begun = time.perf_counter()
import verl
print(json.dumps([time.perf_counter() - begun]))
"""
ALONE = """
import contextlib, importlib, json, os, sys, time
import verl
def memory():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for module in sys.argv[1:]:
    with contextlib.suppress(ImportError if len(sys.argv) > 2 else ()):
        importlib.import_module(module)
assert "verl_fl_overlay" not in sys.modules
begun, cpu, before = time.perf_counter(), time.process_time(), memory()
import verl_fl_overlay
times = [time.perf_counter() - begun, time.process_time() - cpu, memory() - before]
from verl_fl_overlay import activation
states = [status.state.value for status in activation.active().hooks.report()]
print(json.dumps([*times, states.count("installed"), len(states)]))
"""


def run(program: str, variables: dict[str, str], *arguments: str, load: bool = False) -> list[float]:
    """Run ``program`` in a fresh process, where verl loads the overlay or not; return the numbers that it printed."""
    left_out = ("VERL_", "USE_FLAG", "TRAINING_", "PYTHONDONTWRITEBYTECODE")  # an installed package has its bytecode
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env={
            **kept,
            "VERL_USE_EXTERNAL_PLUGINS": "none",
            LOADED_BY: ",".join([OVERLAY] * load + OTHERS),
            **variables,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    numbers: list[float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} ({min(seconds) * 1e3:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    found = compat.find_verl()
    assert found is not None, "verl is not installed"
    hooked = list(dict.fromkeys(hook.module for hook in compat.select(found).hooks if not hook.needs))

    asked = FEATURES["the CPU, FlagGems"]
    run(WHOLE, asked, load=True)  # writes the bytecode
    whole = [(run(WHOLE, {})[0], run(WHOLE, asked, load=True)[0]) for _ in range(pairs)]
    print(f"verl {found.version}, {pairs} runs of each, ms: median (least)")
    print(f"import verl {milliseconds([a for a, _ in whole])}, with the overlay {milliseconds([b for _, b in whole])}")
    print(f"difference of a pair {milliseconds([b - a for a, b in whole])}\n")
    cases = {name: (variables, hooked) for name, variables in FEATURES.items()}
    for name, module in ROLLOUT.items():
        try:
            run(ALONE, FEATURES["the CPU"], module)
        except subprocess.CalledProcessError as error:
            print(f"{name}, not measured: {error.stderr.strip().splitlines()[-1]}\n")
        else:
            cases[f"the CPU, in {name}"] = (FEATURES["the CPU"], [module])
    alone = [{name: run(ALONE, given, *imported) for name, (given, imported) in cases.items()} for _ in range(pairs)]
    print("| asked for | hooks put on | loading the overlay | CPU time of that | MB |\n| --- | --- | --- | --- | --- |")
    for name in cases:
        clock, cpu, memory, put_on, known = zip(*(numbers[name] for numbers in alone), strict=True)
        times = f"{milliseconds(list(clock))} | {milliseconds(list(cpu))}"
        print(f"| {name} | {put_on[0]} of {known[0]} | {times} | {statistics.median(memory) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
