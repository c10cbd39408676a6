"""The command line: ``verl-fl`` or ``python -m verl_fl_overlay``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(prog="verl-fl", description="verl with FlagOS, as an overlay of hooks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="try every hook on the verl that is here and report")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    ops = commands.add_parser("ops", help="list the operators of the FlagGems that is here, and which training may use")
    ops.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or with * and ?")
    ops.add_argument("--json", action="store_true", help="print JSON")
    ops.add_argument("--unsafe", action="store_true", help="only those that training must not use")
    ops.set_defaults(run=_ops)

    pin = commands.add_parser("pin", help="print the pins of a verl release, from its wheel or folder")
    pin.add_argument("source", type=Path, help="a verl wheel, or the folder in which verl/ lies")
    pin.set_defaults(run=_pin)

    options = parser.parse_args(arguments)
    return int(options.run(options))


def _doctor(options: argparse.Namespace) -> int:
    from verl_fl_overlay import doctor

    doctor.quiet()
    result, usable = doctor.examine()
    print(json.dumps(result, indent=1) if options.json else doctor.as_text(result))
    return 0 if usable else 1


def _ops(options: argparse.Namespace) -> int:
    from verl_fl_overlay.errors import OverlayError
    from verl_fl_overlay.flaggems import listing

    try:
        found = listing.operators(options.pattern, options.unsafe)
    except OverlayError as error:
        print(f"verl-fl ops: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
    elif found:
        print(listing.as_text(found))
    else:
        print(f"no operator matches {options.pattern!r}" if options.pattern else "no operators", file=sys.stderr)
    return 0 if found else 1


def _pin(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat import pinning
    from verl_fl_overlay.errors import OverlayError

    try:
        print(pinning.as_text(pinning.pins_of(options.source)), end="")
    except OverlayError as error:
        print(f"verl-fl pin: {error}", file=sys.stderr)
        return 2
    return 0
