"""The command line: ``verl-fl`` or ``python -m verl_fl_overlay``."""

from __future__ import annotations

import argparse
import json
import os
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
    env = commands.add_parser("env", help="show every variable of the stack, what it does and what is wrong with it")
    env.add_argument("--phase", choices=["training", "rollout"], default="", help="leave out what only the other reads")
    form = env.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--sh", action="store_true", help="print the variables that are set as shell exports")
    env.set_defaults(run=_env)

    dispatch = commands.add_parser("dispatch", help="check or write vllm-plugin-FL's dispatch file")
    actions = dispatch.add_subparsers(dest="action", required=True, metavar="ACTION")
    dispatch_check = actions.add_parser("check", help="say what the plugin would ignore or take for something else")
    dispatch_check.add_argument("file", type=Path)
    dispatch_check.set_defaults(run=_dispatch_check)
    render = actions.add_parser("render", help="print the file that does what the environment asks for")
    render.add_argument("--vendor", default="", help="FlagGems' name of the chip's vendor; found, if not given")
    render.set_defaults(run=_dispatch_render)

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


def _env(options: argparse.Namespace) -> int:
    from verl_fl_overlay import environment

    result = environment.examine(os.environ, options.phase)
    if options.sh:
        print(environment.as_exports(os.environ, options.phase))
        print("\n".join(result["errors"]), end="", file=sys.stderr)
    else:
        print(environment.as_json(result) if options.json else environment.as_text(result))
    return 1 if result["errors"] else 0


def _dispatch_check(options: argparse.Namespace) -> int:
    from verl_fl_overlay import vllm_fl
    from verl_fl_overlay.errors import OverlayError

    try:
        findings = vllm_fl.check(vllm_fl.read(options.file))
    except OverlayError as error:
        findings = [str(error)]
    print("\n".join(findings) if findings else f"{options.file}: no faults")
    return 1 if findings else 0


def _dispatch_render(options: argparse.Namespace) -> int:
    from verl_fl_overlay import chips, vllm_fl
    from verl_fl_overlay.errors import OverlayError
    from verl_fl_overlay.settings import Settings

    found, _ = chips.find()
    vendor = options.vendor or (found.vendor if found else "nvidia")
    try:
        print(vllm_fl.render(Settings.from_environment(), vendor), end="")
    except OverlayError as error:
        print(f"verl-fl dispatch render: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat import check, sources
    from verl_fl_overlay.errors import OverlayError

    try:
        with sources.opened(options.target) as tree, sources.PinnedReleases() as pinned:
            report = check.check(tree, options.against, pinned.tree)
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
