"""``check``: whether the hooks hold on a verl, or a transformers, that may not be installed, from its source alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from verl_fl_overlay.cli import terminal
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.release import check, sources
from verl_fl_overlay.compat.release.check import TRIAL, Comparison, Finding, Report, Status
from verl_fl_overlay.errors import UnsupportedVerlError

OTHERS = " or ".join(package.distribution for package in pins.PACKAGES.values() if package != pins.VERL)
TARGET = (
    "a version of verl, 'latest', a wheel, an sdist, the folder in which verl/ lies, or CHECKOUT@REF; "
    f"of {OTHERS}: NAME==VERSION, NAME==latest, a wheel, an sdist, or the folder in which it lies"
)

DIFF = " " * 6
"""What stands before a line of a diff, which is code and is not wrapped."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "The functions that are hooked are compared with those of the tested releases; what changed is shown as a "
        "diff, with what it means. Nothing of the release is imported or run; neither verl nor torch is needed."
    )
    examples = (
        "verl-fl check latest",
        "verl-fl check verl-0.9.1-py3-none-any.whl --all",
        "verl-fl check ~/verl@main --against 0.9.1",
        "verl-fl check transformers==latest --json",
    )
    exits = {0: "the overlay loads with this release", 1: "the overlay would refuse to load with it"}
    terminal.explain(parser, more, examples=examples, exits=exits)
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    against = "compare with this tested release (default: for each function the newest that is not newer)"
    parser.add_argument("--against", metavar="RELEASE", help=against)
    parser.add_argument("--all", action="store_true", help="list every hook (default: those to look at)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with every hook (default: text)")
    terminal.add_wide(form)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the finding for each hook; return 1 if the overlay would refuse to load."""
    try:
        with sources.opened(options.target) as tree, sources.PinnedReleases() as pinned:
            report = check.check(tree, options.against, pinned.tree)
    except UnsupportedVerlError as refusal:  # an answer, as that of another verl on which the overlay does not load
        print(json.dumps({"verdict": str(refusal), "holds": False}, indent=1) if options.json else refusal)
        return 1
    print(json.dumps(check.as_json(report), indent=1) if options.json else as_text(report, options.all, options.wide))
    return 0 if report.holds else 1


def as_text(report: Report, every: bool = False, wide: bool = False) -> str:
    """Lay the report out: the hooks that somebody has to look at, or ``every`` one, what changed, the verdict last."""
    rows: list[tuple[str, str, list[str]]] = []
    for finding in report.findings:
        changes = [
            line
            for comparison in finding.changed
            for line in _change(comparison, "" if comparison is finding.target else f"relies on {comparison.target}: ")
        ]
        rows.append((finding.hook.name, _summary(finding), changes + _means(finding.meaning)))
    if report.trial:
        changed = (comparison for comparison in report.trial if comparison.changed)
        changes = [line for comparison in changed for line in _change(comparison, f"use {comparison.target}: ")]
        without = f"{TRIAL} cannot run on this verl; training does not need it" if report.trial_breaks else ""
        rows.append((TRIAL, _worst(report.trial).status.value, changes + _means(without)))
    shown = [row for row in rows if every or row[2]]
    width = max((len(name) for name, *_ in shown), default=0)
    what = f"{report.release} from {report.origin}, hooks of {report.shim}"
    lines = [*terminal.sentences([what, *packages_as_text(report)], wide=wide), ""]
    for name, told, under in shown:
        status = terminal.Good(told) if told == Status.OK.value else told
        lines += terminal.table((), [(name.ljust(width), status)], wide=wide)
        for text in under:
            lines += terminal.sentences([text], wide=wide or text.startswith(DIFF))
    lines += [] if every else [*([""] if shown else []), *terminal.sentences([_counted(rows)], wide=wide)]
    verdict = (terminal.Good if report.holds else terminal.Bad)(report.verdict)
    return "\n".join([*lines, "", *terminal.sentences([verdict], wide=wide)])


def packages_as_text(report: Report) -> list[str]:
    """Return a line for each pinned package beside verl: which version is here, and for which ones the hooks hold."""
    return [f"{name} {pinned(about)}" for name, about in check.packages(report).items()]


def pinned(about: dict[str, Any]) -> str:
    """Return in words what ``check.packages`` says of one package."""
    return f"{about['version'] or 'not installed'} (pinned: {', '.join(about['pinned'])})"


def _counted(rows: list[tuple[str, str, list[str]]]) -> str:
    others = [told for _, told, under in rows if not under]
    fine = others.count(Status.OK.value)
    apart = f", {len(others) - fine} not compared: their packages have no pins, or are not here"
    return f"{fine} OK{apart if fine < len(others) else ''}; --all lists every one"


def _means(meaning: str) -> list[str]:
    return [f"    means: {meaning}"] if meaning else []


def _change(comparison: Comparison, of_what: str) -> list[str]:
    detail = f" {comparison.detail}" if comparison.detail else ""
    first = f"    {of_what}{comparison.status.value}{detail} (against {comparison.package} {comparison.against})"
    return [first, *(f"{DIFF}{line}" for line in comparison.diff)]


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda comparison: list(Status).index(comparison.status))


def _summary(finding: Finding) -> str:
    target = finding.target
    compared = [c for c in (target, *finding.reliances) if c.status is not Status.UNPINNED]
    if target in compared:
        worst = _worst(compared)
        return worst.status.value if worst is target else f"{target.status.value}, but see below"
    said = f"not compared: {target.detail or 'it is not pinned'}"
    return f"{said}; what it relies on: {_worst(compared).status.value}" if compared else said
