"""``verl-fl ops``: the operators of the FlagGems that is here, and whether training may use them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from verl_fl_overlay.cli import terminal
from verl_fl_overlay.flaggems import faults, library, safety


def add(ops: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "An operator is safe in training unless FlagGems' kernel cuts or falsifies a gradient; the reason is told. "
        "--faults lists what is known to be wrong with kernels, and needs no FlagGems."
    )
    examples = ("verl-fl ops softmax", "verl-fl ops --unsafe --json", "verl-fl ops --faults '*loss*'")
    terminal.explain(ops, more, examples=examples, exits={0: "some are listed", 1: "none match"})
    pattern = "part of a function's name or aten key, or a pattern with * and ? for the whole of it (default: all)"
    ops.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help=pattern)
    ops.add_argument("--unsafe", action="store_true", help="list only those that training must not use (default: all)")
    faults_help = "list the kernels that are known to be wrong in the version here; where none is, in the newest"
    ops.add_argument("--faults", action="store_true", help=faults_help)
    form = ops.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    terminal.add_wide(form)
    ops.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the operators, or the faults; return 1 if there are none.

    Raises:
        FlagGemsError: there is no FlagGems that can be used here; the faults are printed without one.
    """
    if options.faults:
        return print_faults(options.pattern, options.json, options.wide)
    found = operators(options.pattern, options.unsafe)
    if options.json:
        print(json.dumps(found, indent=1))
    elif found:
        print(as_text(found, options.wide))
    else:
        print(f"no operator matches {options.pattern!r}" if options.pattern else "no operators", file=sys.stderr)
    return 0 if found else 1


def operators(pattern: str = "", only_unsafe: bool = False) -> list[dict[str, Any]]:
    """Return the operators by function name: ``{"function", "keys": {aten key: "" or why training must not use it}}``.

    ``pattern`` (``*`` and ``?`` as in file names, else a part of the name) has to match the function or one of its
    aten keys.

    Raises:
        FlagGemsError: there is no FlagGems that can be used here.
    """
    functions: dict[str, dict[str, str]] = {}
    for kernel in library.load().kernels:
        functions.setdefault(kernel.name, {})[kernel.key] = safety.why_unsafe(kernel)
    return [
        {"function": name, "keys": dict(sorted(keys.items()))}
        for name, keys in sorted(functions.items())
        if any(_matches(text, pattern) for text in (name, *keys)) and (not only_unsafe or any(keys.values()))
    ]


def print_faults(pattern: str, as_json: bool, wide: bool) -> int:
    """Print what is known to be wrong with FlagGems' kernels, on any chip; return 1 if nothing is.

    The installed version decides, whether FlagGems can be imported here or not; the newest if none is installed.
    """
    version = library.installed_version()
    found = faults.of_version(library.release(version) if version else faults.NEWEST)
    found = [fault for fault in found if _matches(fault.key, pattern)]
    if as_json:
        print(json.dumps([asdict(fault) for fault in found], indent=1))
        return 0 if found else 1
    rows = [(fault.key, fault.versions, fault.vendor or "all", str(fault)) for fault in found]
    lines = terminal.table(("aten key", "versions", "chips", "what is wrong"), rows, wide=wide)
    known = f"{len(found)} faults are known of flag_gems {version or 'in its newest version (none is installed)'}"
    print("\n".join([*lines, "", *terminal.sentences([known], wide=wide)]))
    return 0 if found else 1


def _matches(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern) if "*" in pattern or "?" in pattern else pattern in text


def as_text(found: list[dict[str, Any]], wide: bool = False) -> str:
    """Lay the operators out as a table: function, aten key, and yes or why not."""
    rows = [
        (entry["function"] if position == 0 else "", key, f"no: {reason}" if reason else "yes")
        for entry in found
        for position, (key, reason) in enumerate(entry["keys"].items())
    ]
    unsafe = sum(1 for row in rows if row[2] != "yes")
    lines = terminal.table(("function", "aten key", "in training"), rows, wide=wide)
    counted = f"{len(found)} functions, {len(rows)} aten keys, {unsafe} of them not safe in training"
    return "\n".join([*lines, "", *terminal.sentences([counted], wide=wide)])
