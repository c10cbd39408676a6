"""The reports that the processes of a run left in VERL_FL_REPORT_DIR, summed up."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from verl_fl_overlay.cli import terminal
from verl_fl_overlay.errors import NOT_JSON, OverlayError


def summed_up(folder: str) -> dict[str, Any]:
    """Return what the processes did: those that did the same as one row, then the hooks, then the problems.

    Raises:
        OverlayError: no report is there.
    """
    reports, unreadable = _read(Path(folder))
    if not reports:
        raise OverlayError(
            f"{folder} holds no report; every process of a run writes one if VERL_FL_REPORT_DIR={folder} is exported"
            + "".join(f"; {fault}" for fault in unreadable[:1])
        )
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    processes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for report in reports:
        alike[_row(report)].append(report)
        for hook in report["hooks"]:
            calls[hook["name"]] += hook["calls"]
            processes[hook["name"]] += bool(hook["calls"])
        problems.update(set(report["problems"]))
        notes.update(set(report.get("notes", ())))
    rows = [
        {
            "processes": len(group),
            "ranks": _ranks(group),
            "program": program,
            "verl": verl,
            "training": "yes" if trained else "no",
            "hooks called": f"{len(called)} of {installed} installed",
            "features on": list(on),
            "problems": faults,
        }
        for (program, verl, trained, installed, called, on, faults), group in alike.items()
    ]
    return {
        "folder": folder,
        "processes": sorted(rows, key=lambda row: (row["training"], row["program"])),
        "hooks": {name: {"processes": processes[name], "calls": calls[name]} for name in calls if calls[name]},
        "never called": sorted({name for name in calls if not calls[name]} & _required(reports)),
        "trained": any(report["phase"]["counts"] for report in reports),
        "problems": {**dict(problems), **dict.fromkeys(unreadable, 1)},
        "notes": dict(notes),
    }


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    reports, unreadable = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            _row(report)
        except (OSError, *NOT_JSON, KeyError, TypeError, AttributeError) as error:
            unreadable.append(f"{file.name} is no report of verl-fl-overlay: {type(error).__name__}: {error}")
        else:
            reports.append(report)
    return reports, unreadable


def _row(report: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes two processes alike."""
    installed = [hook for hook in report["hooks"] if hook["state"] == "installed"]
    return (
        report["process"].get("program", ""),
        report["verl"]["version"],
        bool(report["phase"]["counts"]),
        len(installed),
        tuple(hook["name"] for hook in installed if hook["calls"]),
        tuple(name for name, feature in report["features"].items() if feature["on"]),
        len(report["problems"]),
    )


def _required(reports: Iterable[dict[str, Any]]) -> set[str]:
    """Return the required hooks that are on in a process that trained; a run need not have a use for all of them.

    SFT without validation infers nothing, and the hooks of another engine are on where that engine is installed.
    """
    trained = (report for report in reports if report["phase"]["counts"])
    return {h["name"] for report in trained for h in report["hooks"] if h["required"] and h["state"] == "installed"}


def _ranks(group: Iterable[dict[str, Any]]) -> str:
    """Return the ranks of these processes, such as 0-3,8; "-" where they have none."""
    ranks = sorted({int(rank) for report in group if str(rank := report["process"].get("rank")).isdecimal()})
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def as_text(result: dict[str, Any], wide: bool = False) -> str:
    """Lay the sum out as tables."""
    head = ["processes", "ranks", "verl", "training", "hooks called", "problems", "program and its features"]
    rows = [
        [
            str(row["processes"]),
            row["ranks"],
            str(row["verl"]),
            row["training"],
            row["hooks called"].removesuffix(" installed"),
            (terminal.Bad if row["problems"] else str)(row["problems"]),
            f"{row['program'] or '-'}: {', '.join(row['features on']) or 'none'}",
        ]
        for row in result["processes"]
    ]
    lines = terminal.table(head, rows, wide=wide)
    hooks = [(str(told["processes"]), str(told["calls"]), name) for name, told in result["hooks"].items()]
    lines += (
        ["", *terminal.table(("called in processes", "calls", "hook"), hooks)] if hooks else ["", "no hook was called"]
    )
    said = []
    if result["never called"]:
        never = ", ".join(result["never called"])
        said.append(f"required where training does what they are for, and called in no process: {never}")
    said += [] if result["trained"] else ["no process trained with the overlay"]
    lines += [line for text in said for line in ("", *terminal.sentences([text], wide=wide))]
    problems = [f"{problem} ({count} of the processes)" for problem, count in result["problems"].items()]
    lines += ["", *terminal.problems(problems, wide=wide)]
    lines += terminal.listed(
        "notes", [f"{note} ({count} of the processes)" for note, count in result["notes"].items()], wide=wide
    )
    return "\n".join(lines)
