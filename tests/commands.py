"""All commands, found in the parser: a new one is tested without being named in a test."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from verl_fl_overlay import cli


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers below ``parser`` that have no commands of their own, or the parser itself."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for command in action.choices.values():
            yield from _leaves(command)
    if not below:
        yield parser


OVERVIEW = cli.parser(cli.NAMES)
COMMANDS = {parser.prog.removeprefix("verl-fl "): parser for parser in _leaves(OVERVIEW)}
"""What one types after verl-fl -> the parser of its arguments."""


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """Return the examples of a command's help, without their comments."""
    found = str(parser.epilog).partition("\n\n")[0].splitlines()[1:]
    return [example.partition("#")[0].strip() for example in found]


def statuses(parser: argparse.ArgumentParser) -> dict[int, str]:
    """Return the exit statuses that a command's help names, and what each means."""
    found = re.findall(r"^  (\d+) +(.*)$", str(parser.epilog).partition("\n\nexit status:\n")[2], re.MULTILINE)
    return {int(status): meaning for status, meaning in found}
