"""The command line, ``verl-fl`` or ``python -m verl_fl_overlay``: one file per command.

A command's file is imported when the command is asked for, since some of them need packages that take long to import.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterable

from verl_fl_overlay import __version__
from verl_fl_overlay.cli import terminal
from verl_fl_overlay.errors import OverlayError, nearest

COMMANDS = {
    "Before a run": {
        "install-hint": "print the lines that install a component into this environment without breaking verl",
        "doctor": "try every hook and every component that is asked for, and report",
        "config": "print the exports and the overrides with which verl trains a model on a chip, and why",
        "env": "show every variable of the stack, what it does and what is wrong with it",
        "estimate": "say what a step takes with and without the overlay, from measurements",
        "warmup": "fill the kernels' caches: run one step of a model in this environment",
    },
    "Are the numbers right, and what is faster?": {
        "parity": "compare a step with and without the overlay, on the same weights",
        "tune": "measure which operators are faster from FlagGems, for a model",
        "ops": "list the operators of the FlagGems that is here, and which training may use",
    },
    "Rollout": {
        "dispatch": "check or write the file of vllm-plugin-FL or sglang-plugin-FL",
    },
    "Another release of verl": {
        "check": "say whether the hooks hold on a release, from its source alone",
        "pin": "print the pins of a release, from its source alone",
    },
}
"""What a user wants -> the commands for it and what each does; a command's file has its name."""

NAMES = {name: summary for group in COMMANDS.values() for name, summary in group.items()}


class _Overview(terminal.Parser):
    """The parser of ``verl-fl``; its help is the commands, by what a user wants."""

    def format_help(self) -> str:
        width = max(map(len, NAMES))
        usage = f"usage: {self.prog} [-h] [--version] COMMAND ..."
        lines = [*terminal.folded(usage), "", *terminal.folded(str(self.description)), ""]
        for group, commands in COMMANDS.items():
            rows = [(f"  {name.ljust(width)}", summary) for name, summary in commands.items()]
            lines += [*terminal.folded(group), *terminal.table((), rows), ""]
        last = "What a command takes, does and returns: verl-fl COMMAND --help"
        return "\n".join([*lines, *terminal.folded(last), ""])


def parser(asked: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser; only the commands that are ``asked`` for have their arguments."""
    whole = _Overview(
        prog="verl-fl",
        description="Trains verl with FlagOS, by hooks: export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay.",
    )
    whole.add_argument("--version", action="version", version=f"verl-fl-overlay {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", parser_class=terminal.Parser)
    for name, summary in NAMES.items():
        command = commands.add_parser(name, description=summary)
        if name in asked:
            importlib.import_module(f"verl_fl_overlay.cli.{name.replace('-', '_')}").add(command)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; if it cannot be done, print the reason in a line and return 2."""
    if not terminal.prepare():
        return _refused("verl-fl", "standard output is closed, and all that a command says goes there")
    called = "verl-fl"
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, _leave)
    try:
        try:
            given = sys.argv[1:] if arguments is None else arguments
            asked = [argument for argument in given if not argument.startswith("-")][:1]
            whole = parser(asked)
            if asked and asked[0] not in NAMES:
                whole.error(f"there is no command {asked[0]!r}{nearest(asked[0], NAMES)}")
            options, unknown = whole.parse_known_args(given)
            called = " ".join(filter(None, (called, options.command, getattr(options, "action", ""))))
            if unknown:
                terminal.Parser(prog=called).error(f"unrecognized arguments: {' '.join(unknown)}")
            if not options.command:
                whole.print_help()
                return 2
            return int(options.run(options))
        finally:
            sys.stdout.flush()  # here, where its errors are told; the end of the interpreter would do it too
    except BrokenPipeError:
        terminal.give_up()
        return terminal.LEFT_BY_READER
    except KeyboardInterrupt:
        _refused(called, "interrupted")
        return terminal.INTERRUPTED
    except OverlayError as error:
        return _refused(called, str(error))
    except OSError as error:
        if error.filename is not None:
            return _refused(called, f"{error.filename} cannot be read or written: {error.strerror}")
        if isinstance(error, FileNotFoundError) and not _is_in_a_folder():
            return _refused(called, "the folder in which you are was removed; cd to another")
        if error.errno not in _UNWRITTEN:  # a library's own, whose text and traceback are needed
            raise
        terminal.give_up()
        return _refused(called, f"cannot be written to standard output, or a temporary file: {error.strerror}")
    except ModuleNotFoundError as error:
        if error.name != "torch":  # the overlay does not require it; commands that run a step or a kernel do
            raise
        return _refused(called, "torch is not installed: install the build for your chip (NVIDIA's: pip install torch)")


_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""How a write to what is open fails, which names no file."""


def _is_in_a_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _leave(number: int, _: object) -> None:
    """End as a batch system or a window that closes asks; by an exception, so that started processes end too."""
    raise SystemExit(128 + number)


def _refused(called: str, reason: str) -> int:
    try:
        print(f"{called}: {reason}", file=sys.stderr)
    except OSError:  # where nothing can be said, the exit status says it
        terminal.give_up()
    return 2
