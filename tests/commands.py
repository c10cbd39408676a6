"""All commands, found in the parser: a new one is tested without being named in a test."""

from __future__ import annotations

import argparse
import re

import pages

from verl_fl_overlay import cli

OVERVIEW = cli.parser(cli.NAMES)
COMMANDS = {name: parser for name, parser in pages.parsers().items() if not pages.actions(parser)}
"""What one types after verl-fl -> the parser of its arguments."""


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """Return the examples of a command's help, without their comments."""
    found = str(parser.epilog).partition("\n\n")[0].splitlines()[1:]
    return [example.partition("#")[0].strip() for example in found]


def statuses(parser: argparse.ArgumentParser) -> dict[int, str]:
    """Return the exit statuses that a command's help names, and what each means."""
    found = re.findall(r"^  (\d+) +(.*)$", str(parser.epilog).partition("\n\nexit status:\n")[2], re.MULTILINE)
    return {int(status): meaning for status, meaning in found}
