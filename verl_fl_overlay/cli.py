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

    env = commands.add_parser("env", help="show every variable of the stack, what it does and what is wrong with it")
    env.add_argument("--phase", choices=["training", "rollout"], default="", help="leave out what only the other reads")
    form = env.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--sh", action="store_true", help="print the variables that are set as shell exports")
    env.set_defaults(run=_env)

    dispatch = commands.add_parser("dispatch", help="check or write vllm-plugin-FL's dispatch file")
    actions = dispatch.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="say what the plugin would ignore or take for something else")
    check.add_argument("file", type=Path)
    check.set_defaults(run=_dispatch_check)
    render = actions.add_parser("render", help="print the file that does what the environment asks for")
    render.add_argument("--vendor", default="", help="FlagGems' name of the chip's vendor; found, if not given")
    render.set_defaults(run=_dispatch_render)

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


def _pin(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat import pinning
    from verl_fl_overlay.errors import OverlayError

    try:
        print(pinning.as_text(pinning.pins_of(options.source)), end="")
    except OverlayError as error:
        print(f"verl-fl pin: {error}", file=sys.stderr)
        return 2
    return 0
