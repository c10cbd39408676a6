"""The command line, ``verl-fl`` or ``python -m verl_fl_overlay``: one file a command."""

from __future__ import annotations

import argparse
import sys

from verl_fl_overlay import __version__
from verl_fl_overlay.errors import OverlayError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status: 2 with a line that says why, where the overlay refuses."""
    from verl_fl_overlay.cli import check, dispatch, doctor, env, ops, parity, pin, tune, warmup

    parser = argparse.ArgumentParser(prog="verl-fl", description="verl with FlagOS, as an overlay of hooks.")
    parser.add_argument("--version", action="version", version=f"verl-fl-overlay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (doctor, ops, env, dispatch, check, pin, tune, warmup, parity):
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except OverlayError as error:
        refusal = str(error)
    except ModuleNotFoundError as error:
        if error.name != "torch":  # an extra, and what runs a step or a kernel needs it
            raise
        refusal = "torch is not installed: pip install torch"
    command_line = " ".join(filter(None, (options.command, getattr(options, "action", ""))))
    print(f"verl-fl {command_line}: {refusal}", file=sys.stderr)
    return 2
