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

    target = "a version, 'latest', a wheel, an sdist, the folder in which verl/ lies, or CHECKOUT@REF"
    check = commands.add_parser("check", help="say whether the hooks hold on a verl release, from its source alone")
    check.add_argument("target", help=target)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--against", metavar="RELEASE", help="the pinned release to compare with (default: the nearest)")
    check.set_defaults(run=_check)

    pin = commands.add_parser("pin", help="print the pins of a verl release, from its source alone")
    pin.add_argument("target", help=target)
    pin.add_argument("--write", action="store_true", help="write them to compat/pins/VERSION.json of this checkout")
    pin.set_defaults(run=_pin)

    options = parser.parse_args(arguments)
    return int(options.run(options))


def _doctor(options: argparse.Namespace) -> int:
    from verl_fl_overlay import doctor

    doctor.quiet()
    result, usable = doctor.examine()
    print(json.dumps(result, indent=1) if options.json else doctor.as_text(result))
    return 0 if usable else 1


def _check(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat import check, sources
    from verl_fl_overlay.errors import OverlayError

    try:
        with sources.opened(options.target) as tree:
            report = check.check(tree, options.against)
    except OverlayError as error:
        print(f"verl-fl check: {error}", file=sys.stderr)
        return 2
    print(json.dumps(check.as_json(report), indent=1) if options.json else check.as_text(report))
    return 0 if report.holds else 1


def _pin(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat import pinning, sources
    from verl_fl_overlay.errors import OverlayError

    try:
        with sources.opened(options.target) as tree:
            pins = pinning.pins_of(tree)
    except OverlayError as error:
        print(f"verl-fl pin: {error}", file=sys.stderr)
        return 2
    if options.write:
        file = Path(pinning.__file__).parent / "pins" / f"{pins['verl']}.json"
        file.write_text(pinning.as_text(pins), encoding="utf-8")
        print(file)
    else:
        print(pinning.as_text(pins), end="")
    return 0
