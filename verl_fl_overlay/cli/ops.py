"""``verl-fl ops``: the operators of the FlagGems that is here, and whether training may use them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from verl_fl_overlay.flaggems import faults, library, safety


def add(commands: Any) -> None:
    """Add the command."""
    ops = commands.add_parser("ops", help="list the operators of the FlagGems that is here, and which training may use")
    ops.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or with * and ?")
    ops.add_argument("--json", action="store_true", help="print JSON")
    ops.add_argument("--unsafe", action="store_true", help="only those that training must not use")
    ops.add_argument("--faults", action="store_true", help="what is known to be wrong in the version here, else newest")
    ops.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the operators, or the faults; return 1 if there are none.

    Raises:
        FlagGemsError: there is no FlagGems that can be used here; the faults are printed without one.
    """
    if options.faults:
        return print_faults(options.pattern, options.json)
    found = operators(options.pattern, options.unsafe)
    if options.json:
        print(json.dumps(found, indent=1))
    elif found:
        print(as_text(found))
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


def print_faults(pattern: str, as_json: bool = False) -> int:
    """Print what is known to be wrong with FlagGems' kernels, on any chip; return 1 if nothing is.

    The installed version decides, whether FlagGems can be imported here or not; the newest if none is installed.
    """
    version = library.installed_version()
    found = faults.of_version(library.release(version) if version else faults.NEWEST)
    found = [fault for fault in found if _matches(fault.key, pattern)]
    if as_json:
        print(json.dumps([asdict(fault) for fault in found], indent=1))
        return 0 if found else 1
    for fault in found:
        where = f" [{fault.vendor} alone]" if fault.vendor else ""
        print(f"aten::{fault.key}{where}, {fault.versions}: {fault}")
    print(f"{len(found)} faults are known of flag_gems {version or 'in its newest version (none is installed)'}")
    return 0 if found else 1


def _matches(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern) if "*" in pattern or "?" in pattern else pattern in text


def as_text(found: list[dict[str, Any]]) -> str:
    """Lay the operators out as aligned text: function, aten key, and yes or why not."""
    rows = [
        (entry["function"] if position == 0 else "", key, f"no: {reason}" if reason else "yes")
        for entry in found
        for position, (key, reason) in enumerate(entry["keys"].items())
    ]
    head = ("function", "aten key", "in training")
    function, key = (max(len(row[column]) for row in [head, *rows]) for column in (0, 1))
    unsafe = sum(1 for row in rows if row[2] != "yes")
    return "\n".join(
        [
            *(f"{row[0].ljust(function)}  {row[1].ljust(key)}  {row[2]}" for row in [head, *rows]),
            "",
            f"{len(found)} functions, {len(rows)} aten keys, {unsafe} of them not safe in training",
        ]
    )
