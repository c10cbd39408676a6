"""Watch a training run for what grows: memory, device memory, open files, threads, the overlay's reports.

python benchmarks/endurance.py [--json FILE] [--reports FOLDER] [--every SECONDS] [--limit SECONDS] -- COMMAND...

COMMAND is any that trains and prints verl's "step:N - " or the demos' "step N/M": the recipes, examples/grpo.py, a
command of your own.  All processes below it are watched, Ray's among them, also those that outlive their parents.
Samples are taken from the first step to the last.  Something grows if its median in their last quarter is above that
in the second by more than the allowance of its kind; the first quarter, in which caches fill, is not looked at.

Exit status: that of COMMAND, or 1 if it is 0 and something grew; with --limit, which ends COMMAND early, as if it had
ended well.  Processes that are left of COMMAND are ended.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

STEP = re.compile(r"\bstep(?::(\d+) - |\s+(\d+)/\d+ )")
PR_SET_CHILD_SUBREAPER = 36
MB = 1e6
ALLOWED = {
    "memory, MB": (0.02, 8.0),
    "device memory, MB": (0.01, 64.0),
    "open files": (0.02, 3.0),
    "threads": (0.02, 3.0),
    "reports, files": (0.0, 0.0),
    "reports, MB": (0.02, 0.01),
    "processes": (0.0, 0.5),
    "shared memory, MB": (0.05, 32.0),
    "step, s": (0.2, 0.2),
}
"""How much more than in the second quarter a measure may be in the last: a part of it, or so much."""

GROWS_BY_ITSELF = {
    ("gcs_server", "memory, MB"): (
        math.inf,
        "Ray keeps what the last 100,000 tasks did (RAY_task_events_report_interval_ms=0 stops it)",
    ),
    ("ray::RewardLoopWorker", "threads"): (
        32,
        "verl calls reward functions in asyncio's pool, which starts up to 32 threads as calls overlap",
    ),
}
"""What is known to grow in processes of others, by how much at most, and why; it is not counted."""

QUERY = ["nvidia-smi", "--format=csv,noheader,nounits"]


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends, as init would (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def role(process: psutil.Process) -> str:
    """Return what a process is for: the Ray actor's class, or the program."""
    words = process.cmdline()
    if not words:
        return process.name()
    title = re.match(r"ray::([A-Za-z_]\w*)", words[0])
    if title:
        return f"ray::{title[1]}"
    module = words.index("-m") + 1 if "-m" in words[:-1] else 0
    script = len(words) > 1 and words[1].endswith(".py")
    return words[module] if module else Path(words[script]).name


def of_process(process: psutil.Process) -> dict[str, float]:
    """Return what one process holds: memory of its own, memory that it shares (Ray's objects), open files, threads."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        if "RssAnon" in status:
            return {
                "memory, MB": int(status["RssAnon"].split()[0]) * 1024 / MB,
                "shared memory, MB": int(status["RssShmem"].split()[0]) * 1024 / MB,
                "open files": process.num_fds(),
                "threads": int(status["Threads"]),
            }
    raise psutil.NoSuchProcess(process.pid)


@dataclass
class Device:
    """A device's memory: what of it is in use, and what each process holds of that, in MB."""

    used: float
    held: dict[int, float] = field(default_factory=dict)


def of_devices() -> dict[str, Device]:
    """Return the NVIDIA devices of this host; none where nvidia-smi is missing."""
    if not shutil.which("nvidia-smi"):
        return {}

    def ask(what: str) -> Iterable[list[str]]:
        done = subprocess.run([*QUERY, what], capture_output=True, text=True, timeout=30, check=False)
        return ([word.strip() for word in line.split(",")] for line in done.stdout.splitlines())

    found, names = {}, {}
    with contextlib.suppress(ValueError, subprocess.TimeoutExpired):
        for index, uuid, used in ask("--query-gpu=index,uuid,memory.used"):
            names[uuid] = f"device {index}"
            found[names[uuid]] = Device(float(used))
    with contextlib.suppress(ValueError, KeyError, subprocess.TimeoutExpired):
        for pid, uuid, held in ask("--query-compute-apps=pid,gpu_uuid,used_memory"):
            found[names[uuid]].held[int(pid)] = float(held)
    return found


def of_reports(folder: Path | None) -> dict[str, float]:
    """Return number and size of the files in the folder of VERL_FL_REPORT_DIR."""
    if folder is None:
        return {}
    sizes = []
    for file in folder.glob("*"):
        with contextlib.suppress(OSError):  # moved to its name meanwhile
            sizes.append(file.stat().st_size)
    return {"reports, files": len(sizes), "reports, MB": sum(sizes) / MB}


def sample(reports: Path | None) -> dict[str, dict[str, float]]:
    """Return the measures of every process below this one, of the whole run, and of its devices without other jobs.

    Where nvidia-smi tells of none of these processes, as in some containers, all devices are taken for the run's.
    """
    devices = of_devices()
    found: dict[str, dict[str, float]] = {}
    watched = psutil.Process().children(recursive=True)
    for process in watched:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                held = of_process(process)
                on_devices = [device.held[process.pid] for device in devices.values() if process.pid in device.held]
                if on_devices:
                    held["device memory, MB"] = sum(on_devices)
                found[f"{role(process)} {process.pid}"] = held
    whole = {"processes": float(len(found)), **of_reports(reports)}
    for name in ("memory, MB", "open files"):
        whole[name] = sum(held[name] for who, held in found.items() if (who.split()[0], name) not in GROWS_BY_ITSELF)
    found["whole run"] = whole
    ours = {process.pid for process in watched}
    used = {name: device for name, device in devices.items() if ours & device.held.keys()}
    for name, device in (used or devices).items():
        others = sum(held for pid, held in device.held.items() if pid not in ours)
        found[name] = {"device memory, MB": device.used - others}
    return found


class Steps(threading.Thread):
    """Reads what the command prints, into a log, and notes when each step was done."""

    def __init__(self, output: Any, log: Any) -> None:
        super().__init__(daemon=True)
        self.at: dict[int, float] = {}
        self._output, self._log = output, log

    def run(self) -> None:
        for line in self._output:
            self._log.write(line)
            match = STEP.search(line)
            if match:
                self.at.setdefault(int(match[1] or match[2]), time.monotonic())


def quarters(numbers: list[float]) -> tuple[float, float]:
    """Return the medians of the second quarter and of the last."""
    quarter = len(numbers) // 4
    return statistics.median(numbers[quarter : 2 * quarter]), statistics.median(numbers[-quarter:])


def judged(samples: list[dict[str, Any]], steps: dict[int, float]) -> list[dict[str, Any]]:
    """Return a row for each measure of each process that was there from the second quarter on."""
    times = sorted(steps.values())
    inside = [s for s in samples if times and times[0] <= s["at"] <= times[-1]]
    if len(inside) < 8:
        return []
    counted = inside[len(inside) // 4 :]
    series = {
        (who, what): [s["processes"][who][what] for s in inside if what in s["processes"].get(who, {})]
        for who, held in counted[0]["processes"].items()
        for what in held
        if all(what in s["processes"].get(who, {}) for s in counted)
    }
    series["whole run", "step, s"] = [after - before for before, after in pairwise(times)]
    rows = []
    for (who, what), numbers in series.items():
        if len(numbers) < 8:
            continue
        before, after = quarters(numbers)
        part, least = ALLOWED[what]
        row = {"who": who, "what": what, "second quarter": before, "last quarter": after}
        grew = after - before > max(part * before, least)
        most, why = GROWS_BY_ITSELF.get((who.split()[0], what), (0.0, ""))
        known = grew and after - before <= most
        rows.append({**row, "grew": grew and not known, **({"known": why} if known else {})})
    return rows


def left_behind(patience: float) -> list[str]:
    """End what is left of the command after ``patience``, seconds; return what it was."""
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=patience)
    told = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append(f"{role(process)} {process.pid}")
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return told


def watch(options: argparse.Namespace) -> dict[str, Any]:
    """Run the command to its end or the limit; return samples, steps and how it ended."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it watches too
    log_file = options.json.with_suffix(".output")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    begun, samples = time.monotonic(), []
    told = " ".join(Path(word).name if Path(word).is_absolute() else word for word in options.command)
    result: dict[str, Any] = {"device": device(), "versions": versions(), "command": told}
    with contextlib.ExitStack() as cleaned:
        log = cleaned.enter_context(open(log_file, "w", encoding="utf-8", buffering=1))
        taken = cleaned.enter_context(open(options.json.with_suffix(".samples"), "w", encoding="utf-8", buffering=1))
        command = subprocess.Popen(
            options.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        cleaned.callback(lambda: result.update({"left behind": left_behind(0 if "ended by" in result else 10)}))
        steps = Steps(command.stdout, log)
        steps.start()
        said = begun
        while command.poll() is None:
            now = time.monotonic()
            late = options.limit and now - begun > options.limit
            samples.append({"at": now, "processes": sample(options.reports)})
            at = {"at, s": round(now - begun, 1), "step": max(steps.at, default=0)}
            taken.write(json.dumps({**at, **samples[-1]["processes"]}) + "\n")
            if now - said > 60 or late:
                said = now
                whole = samples[-1]["processes"]["whole run"]
                print(f"{now - begun:6.0f} s  step {max(steps.at, default=0)}  {shown(whole)}", flush=True)
                result.update(summary(samples, steps.at, begun))
                options.json.write_text(json.dumps(result, indent=1))
            if late:
                command.terminate()
                result["ended by"] = f"--limit {options.limit}"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.wait(20)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(options.every)
    steps.join(10)
    result["exit status"] = 0 if "ended by" in result else command.wait()
    result.update(summary(samples, steps.at, begun))
    options.json.write_text(json.dumps(result, indent=1))
    return result


def summary(samples: list[dict[str, Any]], steps: dict[int, float], begun: float) -> dict[str, Any]:
    """Return what the samples say."""
    return {
        "steps": len(steps),
        "seconds": round(time.monotonic() - begun, 1),
        "samples": len(samples),
        "rows": judged(samples, dict(steps)),
    }


def versions() -> dict[str, str]:
    """Return the versions of what may train here."""
    found = {}
    for name in ("verl", "verl-fl-overlay", "torch", "transformers", "ray", "vllm", "sglang", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def device() -> str:
    """Return the names of the NVIDIA devices, "cpu" without any."""
    if not shutil.which("nvidia-smi"):
        return "cpu"
    done = subprocess.run([*QUERY, "--query-gpu=name"], capture_output=True, text=True, check=False)
    return ", ".join(done.stdout.splitlines()) or "cpu"


def shown(held: dict[str, float]) -> str:
    return ", ".join(f"{name.replace(', ', ' ')} {value:.6g}" for name, value in held.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("out/endurance.json"), help="beside it: .output, .samples")
    parser.add_argument("--reports", type=Path, help="the folder of VERL_FL_REPORT_DIR")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--limit", type=float, help="seconds after which COMMAND is ended")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    options.json = options.json.resolve()
    result = watch(options)
    for row in result["rows"]:
        print(
            f"{'GREW' if row['grew'] else '    '} {row['who']:<44} {row['what']:<18} "
            f"{row['second quarter']:10.2f} -> {row['last quarter']:10.2f}  {row.get('known', '')}"
        )
    grew = [row for row in result["rows"] if row["grew"]]
    print(
        f"{result['steps']} steps in {result['seconds']:.0f} s, exit status {result['exit status']}, "
        f"{len(grew)} of {len(result['rows'])} measures grew, left behind: {result['left behind'] or 'nothing'}"
    )
    if result["exit status"]:
        print("".join(options.json.with_suffix(".output").read_text().splitlines(keepends=True)[-40:]))
    elif not result["rows"]:
        print("too few samples between the first step and the last: nothing was judged")
        return 1
    return result["exit status"] or int(bool(grew))


if __name__ == "__main__":
    raise SystemExit(main())
