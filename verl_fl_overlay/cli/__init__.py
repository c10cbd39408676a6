"""The command line, ``verl-fl`` or ``python -m verl_fl_overlay``: one file per command."""

from __future__ import annotations

import argparse
import sys

from verl_fl_overlay import __version__
from verl_fl_overlay.cli import terminal
from verl_fl_overlay.errors import OverlayError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; if the overlay refuses, print the reason and return 2."""
    from verl_fl_overlay.cli import check, config, dispatch, doctor, env, ops, parity, pin, tune, warmup

    parser = argparse.ArgumentParser(prog="verl-fl", description="verl with FlagOS, as an overlay of hooks.")
    parser.add_argument("--version", action="version", version=f"verl-fl-overlay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (doctor, config, ops, env, dispatch, check, pin, tune, warmup, parity):
        command.add(commands)
    try:
        options = parser.parse_args(arguments)
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return terminal.reader_is_gone()
    except OverlayError as error:
        refusal = str(error)
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is an extra; commands that run a step or a kernel need it
            raise
        refusal = "torch is not installed: pip install torch"
    command_line = " ".join(filter(None, (options.command, getattr(options, "action", ""))))
    print(f"verl-fl {command_line}: {refusal}", file=sys.stderr)
    return 2
