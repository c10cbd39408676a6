"""Run every GPU test and benchmark that this machine allows: ``python tools/gpu.py``, or ``nox -s gpu``.

    python tools/gpu.py [--folder out/gpu] [--minutes N] [--only tests|NAME,...] [--keep]

It runs in the Python that is here and installs nothing.  The results are in FOLDER/CARD-DATE/: results.json, written
before and after each item, so that a run which is cut keeps what it has; each item's log, and what it wrote itself.
What the machine does not allow is "not run", with the reason.  The exit status is 1 if an item failed, or none passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any

from junit import cases
from locks import locked

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "out" / "gpu"
RESULTS = "results.json"


@dataclass(frozen=True)
class Item:
    """Something to run, in the repository's folder.

    In ``command``, which a shell runs, {python} is this Python, {json} a file that the item writes, {folder} one for
    what else it writes, {junit} pytest's results, {tests} the options of tests that share a GPU, and {minutes} how long
    it may take.  It is begun if its ``minutes``, which an H100 takes, are left, and ended after ``PATIENCE`` times as
    many.  ``needs`` are modules, ``cards`` accelerators.  What is not for ``cuda`` alone says itself where it runs.
    """

    name: str
    command: str
    minutes: float = 1
    needs: tuple[str, ...] = ("verl",)
    cards: int = 1
    cuda: bool = True


PATIENCE = 3
TESTS = {
    "test_attention_gpu": 6.0,
    "test_flaggems": 6,
    "test_fused_gpu": 2,
    "test_megatron": 2,
    "test_odd_batches_gpu": 2,
    "test_te_fl_gpu": 2,
    "test_two_gpus": 5,
    "test_vllm_plugin_gpu": 5,
}
"""Minutes of tests that take longer than one."""

GRPO = "--minutes {minutes} --folder {folder} --json {json}"
ENDURANCE = (
    "{python} benchmarks/grpo.py --prepare --size small --folder {folder} && MODEL={folder}/small/model"
    " DATA={folder}/small/problems.parquet OUT={folder}/run BATCH=8 PROMPT=64 RESPONSE=192 EPOCHS=1000 SAVE=-1"
    " {python} benchmarks/endurance.py --json {json} --reports {folder}/run/reports"
    " -- bash examples/recipes/grpo_vllm.sh trainer.total_training_steps=100"
    " +actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=2000000000"
)

ITEMS = (
    Item(
        "doctor",
        "VERL_USE_EXTERNAL_MODULES=verl_fl_overlay {python} -m verl_fl_overlay doctor --json > {json}",
        cuda=False,
    ),
    *(
        Item(
            f"tests/gpu/{file.name}",
            f"{{python}} -m pytest -m gpu {{tests}} tests/gpu/{file.name} --junitxml={{junit}}",
            TESTS.get(file.stem, 1),
            needs=("pytest",),
            cuda=False,
        )
        for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda file: (TESTS.get(file.stem, 1), file))
    ),
    Item(
        "realistic",
        "{python} benchmarks/realistic.py --turns 1 --json {json} --rows 'packed flash-attn,packed overlay,"
        "packed flash-attn liger,packed flash-attn overlay,packed overlay recompute none'",
        6,
    ),
    Item("grpo", f"{{python}} benchmarks/grpo.py {GRPO}", 7, needs=("verl", "ray", "vllm")),
    Item("grpo on two GPUs", f"{{python}} benchmarks/grpo.py --gpus 2 {GRPO}", 7, ("verl", "ray", "vllm"), cards=2),
    Item("ranks", "{python} benchmarks/ranks.py --only numbers --minutes {minutes} --json {json}", 5, cards=2),
    Item("scaling", "{python} benchmarks/ranks.py --only scaling --minutes {minutes} --json {json}", 4, cards=2),
    Item("endurance", ENDURANCE, 12, needs=("verl", "ray", "vllm")),
    Item("engines", "{python} -m pytest tests/engines --junitxml={junit}", 4, needs=("pytest", "verl")),
    Item("attention", "{python} benchmarks/attention.py", needs=()),
    Item("logprobs", "{python} benchmarks/logprobs.py --json {json}", needs=()),
    Item("head", "{python} benchmarks/head.py --json {json}", needs=()),
    Item("families", "{python} benchmarks/families.py --json {json}", 3, needs=("transformers",)),
    Item("alternating", "{python} benchmarks/alternating.py", 3),
    Item(
        "realistic padded", "{python} benchmarks/realistic.py --turns 1 --json {json} --rows 'padded,padded overlay'", 5
    ),
    Item("step", "{python} benchmarks/step.py --json {json}", 6),
    Item("flaggems_routing", "{python} benchmarks/flaggems_routing.py --json {json}", 6, needs=("verl", "flag_gems")),
    Item("hooks", "VERL_USE_EXTERNAL_PLUGINS=none {python} benchmarks/hooks.py"),
    Item("load", "{python} benchmarks/load.py"),
)
"""All that there is to run, the most important first."""

# Asked in a process of its own: an accelerator's context would take memory from the items.
PROBE = """
import importlib.metadata, json, subprocess, sys
from importlib.util import find_spec
from verl_fl_overlay import __version__
from verl_fl_overlay.versions import versions
from verl_fl_overlay.devices import accelerator, chips
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.table import shown

found = {"overlay": __version__, **versions()}
for distribution in ("verl", "tensordict", "peft", "megatron-core", "mbridge", "liger-kernel"):
    try:
        found[distribution] = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
settings, _ = Settings.parse()
chip, _ = chips.chosen(settings)
module = None
if find_spec("torch"):
    import torch
    if chip:
        chips.is_available(chip)  # which imports the vendor's package
    module = accelerator.accelerator()
    found |= {name: told for name, told in {"cuda": torch.version.cuda, "hip": torch.version.hip}.items() if told}
names = [str(module.get_device_name(i)) for i in range(module.device_count())] if module else []
try:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.split("\\n")[0].strip()
except (OSError, subprocess.TimeoutExpired):
    driver = ""
print(json.dumps({
    "device": names[0] if names else "",
    "cards": len(names),
    "type": module.__name__.rpartition(".")[2] if module else "cpu",
    "driver": driver,
    "versions": found,
    "environment": {name: shown(name, text) for name, text in settings.given.items()},
    "modules": [name for name in sys.argv[1:] if find_spec(name.partition(".")[0]) and find_spec(name)],
}))
"""


def environment() -> dict[str, str]:
    """Return the environment of all that is run: the overlay is this checkout's, also where another is installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def ask() -> dict[str, Any]:
    """Return what is here (``PROBE`` has the names), and as "lacking" why nothing can run, if so."""
    modules = sorted({"xdist", *(module for item in ITEMS for module in item.needs)})
    command = [sys.executable, "-c", PROBE, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment())
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        nothing = {"device": "", "cards": 0, "type": "cpu", "driver": "", "versions": {}, "environment": {}}
        return {**nothing, "modules": [], "lacking": f"the overlay cannot be loaded: {said}"}
    here: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not here["cards"]:
        here["lacking"] = "no accelerator" + ("" if "torch" in here["versions"] else ": torch is not installed")
    return here


def lacking(item: Item, here: dict[str, Any]) -> str:
    """Say why an item cannot run here; "" if it can."""
    if "lacking" in here:
        return str(here["lacking"])
    if absent := [module for module in item.needs if module not in here["modules"]]:
        return f"needs {', '.join(absent)}"
    if item.cards > here["cards"]:
        return f"needs {item.cards} accelerators, and {here['cards']} is here"
    if item.cuda and here["type"] != "cuda":
        return f"is written for a CUDA device, and {here['type']} is here"
    return ""


def folder_of(here: dict[str, Any], folder: Path, keep: bool) -> Path:
    """Return the folder of the results: CARD-DATE, or with ``keep`` the newest that this card has."""
    card = re.sub(r"\W+", "-", here["device"].lower()).strip("-") or "none"
    card = f"{here['cards']}x-{card}" if here["cards"] > 1 else card
    earlier = sorted(folder.glob(f"{card}-????-??-??")) if keep else []
    return earlier[-1] if earlier else folder / f"{card}-{date.today().isoformat()}"


def commit() -> str:
    """Return what is run: the checkout's commit, with a + if files differ from it; "" if that is not known.

    Beside the repository of a bundle (``tools/bundle.py``) is a file that tells it.  What is no clone may lie in one of
    something else.
    """
    if not (ROOT / ".git").exists():
        manifest = ROOT.parent / "MANIFEST.json"
        return str(json.loads(manifest.read_text()).get("commit", ""))[:7] if manifest.is_file() else ""
    said = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=ROOT)
        except OSError:
            return ""
        if done.returncode:
            return ""
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")


def filled(item: Item, python: str, stem: Path, here: dict[str, Any], limit: float) -> str:
    """Return an item's command for a shell; ``limit`` are seconds, half a minute of which is left for its end."""
    workers = min(8, os.cpu_count() or 1)
    tests = f"-p no:cacheprovider -n {workers} --dist loadgroup" if "xdist" in here["modules"] else ""
    files = {"json": f"{stem}.json", "junit": f"{stem}.xml", "folder": str(stem)}
    quoted = {name: shlex.quote(text) for name, text in {"python": python, **files}.items()}
    return item.command.format(tests=tests, minutes=f"{max(limit / 60 - 0.5, 0.1):.1f}", **quoted)


def ended(command: str, log: Path, seconds: float, stopped: Event) -> int | None:
    """Run a command, its output in ``log``, and end all its processes; return its status, None if it had not ended.

    It is ended as by Ctrl-C, so that it can write what it has, and then by force.  Processes that it left behind would
    hold the accelerator's memory.
    """
    with log.open("w") as output:
        shell = ["sh", "-c", command]
        process = subprocess.Popen(
            shell, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(), start_new_session=True
        )
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not stopped.wait(0.2):
            pass
        status = process.returncode
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sent)
                time.sleep(1)
                process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return status


def errors(found: Any, where: str = "") -> Iterator[str]:
    """Yield each error that a benchmark's JSON tells of one of its parts."""
    if isinstance(found, list):
        for part in found:
            yield from errors(part, where)
    elif isinstance(found, dict):
        for name, part in found.items():
            if name == "error":
                yield f"{where}: {part}".removeprefix(": ")
            else:
                yield from errors(part, f"{where} {name}".strip())


def outcome(status: int | None, stem: Path, why_cut: str, limit: float) -> dict[str, Any]:
    """Return how an item ended that was begun: outcome, why, and what its own files tell.

    ``status`` is None if it had not ended by itself, ``why_cut`` the reason unless it had the time that it may take.
    """
    told: dict[str, Any] = {}
    junit, own = stem.with_suffix(".xml"), stem.with_suffix(".json")
    if junit.exists():
        found = list(cases(junit))
        told["tests"] = dict(Counter(case.outcome for case in found))
        told["failing"] = [case.name for case in found if case.outcome == "failed"]
        reasons = (case.why.removeprefix("not run: ") for case in found if case.outcome == "skipped")
        told["skipped"] = dict(Counter(reasons))
    if own.exists():
        told["json"] = own.name
        try:
            told["errors"] = list(errors(json.loads(own.read_text())))
        except ValueError as error:
            told["errors"] = [f"no JSON: {error}"]
    failing = f"{len(told['failing'])} tests failed" if told.get("failing") else ""
    if status is None and why_cut:
        why = ", ".join(filter(None, [failing, why_cut]))
        return {"outcome": "failed" if failing else "not run", "why": why, **told}
    if status is None:
        return {"outcome": "failed", "why": f"had not ended after {limit:.0f} s", **told}
    tests = told.get("tests", {})
    if status in (0, 5) and tests.get("skipped") and not tests.get("passed"):  # 5: pytest collected none
        return {"outcome": "not run", "why": "; ".join(told["skipped"]), **told}
    if status:
        return {"outcome": "failed", "why": failing or f"ended with exit status {status}", **told}
    return {"outcome": "passed", "why": "", **told}


def words(row: dict[str, Any]) -> str:
    """Say how an item ended."""
    tests = row.get("tests", {})
    counted = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped") if tests.get(name))
    parts = len(row.get("errors", ()))
    more = [row["why"], counted, f"{parts} of its parts had an error" if parts else ""]
    return f"{row['outcome']}: {'; '.join(filter(None, more))}".removesuffix(": ")


class Results:
    """results.json of a folder: what is here, and how each item ended; written with each change."""

    def __init__(self, folder: Path, here: dict[str, Any]) -> None:
        self.file = folder / RESULTS
        about = {"date": date.today().isoformat(), **{name: told for name, told in here.items() if name != "modules"}}
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {**about, "items": {}}
        for name in ("device", "cards", "versions"):
            if self.found[name] != about[name]:
                raise SystemExit(
                    f"{self.file} is of {name} {self.found[name]}, and here is {about[name]}: results of two "
                    "environments are not put together; name another --folder"
                )

    def done(self, item: Item) -> bool:
        """Return whether an item passed or failed before."""
        return self.found["items"].get(item.name, {}).get("outcome") in ("passed", "failed")

    def put(self, item: Item, row: dict[str, Any]) -> None:
        """Write how an item ended."""
        told = {"date": date.today().isoformat(), "commit": commit(), **row}
        self.found["items"][item.name] = told
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.file)

    def status(self) -> int:
        """Return the exit status."""
        ends = Counter(row["outcome"] for row in self.found["items"].values())
        return int(bool(ends["failed"]) or not ends["passed"])


def run(
    items: list[Item], here: dict[str, Any], folder: Path, minutes: float, keep: bool, stopped: Event | None = None
) -> int:
    """Run the items that can run here, one after the other, until ``stopped``; return the exit status."""
    stopped = stopped or Event()
    end = time.monotonic() + 60 * minutes
    results = Results(folder, here)
    print(f"{here['cards']} x {here['device'] or 'no accelerator'}; results: {results.file}", flush=True)
    for number, item in enumerate(items, 1):
        head = f"[{number}/{len(items)}] {item.name}"
        if keep and results.done(item):
            print(f"{head}: kept, {words(results.found['items'][item.name])}", flush=True)
            continue
        left = end - time.monotonic()
        why = lacking(item, here)
        if not why and left < 60 * item.minutes:
            why = f"no time left: it takes about {item.minutes:g} minutes"
        if why:
            again = results.done(item)
            if not again:
                results.put(item, {"outcome": "not run", "why": why})
            print(f"{head}: not run{' again' if again else ''}: {why}", flush=True)
            continue
        stem = folder / re.sub(r"\W+", "-", item.name.removesuffix(".py"))
        for suffix in (".json", ".xml"):
            stem.with_suffix(suffix).unlink(missing_ok=True)
        results.put(item, {"outcome": "not run", "why": "the run ended while it ran"})
        print(f"{head} ...", flush=True)
        limit, begun = min(left, 60 * item.minutes * PATIENCE), time.monotonic()
        log = stem.with_suffix(".log")
        status = ended(filled(item, sys.executable, stem, here, limit), log, limit, stopped)
        seconds = time.monotonic() - begun
        why_cut = ""
        if stopped.is_set():
            why_cut = f"the run was ended after {seconds:.0f} s of it"
        elif limit == left:
            why_cut = f"no time left: cut after {limit:.0f} s"
        row = {**outcome(status, stem, why_cut, limit), "seconds": round(seconds)}
        row["command"] = filled(item, "python", Path(stem.name), here, limit)
        results.put(item, row)
        print(f"{head}: {words(row)} in {seconds:.0f} s", flush=True)
        if stopped.is_set():
            return 1
        if row["outcome"] == "failed":
            print("".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-20:]), flush=True)
    return results.status()


def chosen(only: str | None) -> list[Item]:
    """Return the items that are asked for: all, those whose names are given, or with "tests" all tests."""
    if not only:
        return list(ITEMS)
    names = only.split(",")
    found = [item for item in ITEMS if item.name in names or ("tests" in names and item.name.startswith("tests/"))]
    if unknown := set(names) - {item.name for item in found} - {"tests"}:
        there = ", ".join(["tests", *(item.name for item in ITEMS)])
        raise SystemExit(f"there is no {', '.join(sorted(unknown))}; there are: {there}")
    return found


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all results (default: out/gpu)")
    parser.add_argument("--minutes", type=float, default=240, help="begin nothing that takes longer (default: 240)")
    parser.add_argument("--only", metavar="NAME,...", help="tests, or names of items")
    parser.add_argument("--keep", action="store_true", help="go on: what passed or failed before is not run again")
    options = parser.parse_args()
    stopped = Event()
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, lambda *_: stopped.set())
    items, here = chosen(options.only), ask()
    if stopped.is_set():
        return 1
    folder = folder_of(here, options.folder.absolute(), options.keep)
    with locked(folder, "another gpu.py, here or on a machine with the same storage"):
        return run(items, here, folder, options.minutes, options.keep, stopped)


if __name__ == "__main__":
    raise SystemExit(main())
