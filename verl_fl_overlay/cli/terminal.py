"""What commands write to a terminal, or to a file or pipe in its place: their help, tables and progress.

Tables are as wide as the terminal, or as COLUMNS says, or 80 columns where there is neither; ``--wide`` gives each row
one line. On a terminal they have colours, unless NO_COLOR is set.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LEFT_BY_READER = 141
"""Exit status after the reader of a pipe has gone: 128 + SIGPIPE, as a shell gives it to other programs."""


def command(
    commands: Any, name: str, summary: str, *, more: str = "", examples: Sequence[str], exits: Mapping[int, str]
) -> argparse.ArgumentParser:
    """Add a command and return its parser; ``--help`` shows the summary, ``more``, the examples and the exit status.

    ``exits`` says what each exit status means; 2, which is for what was asked in a wrong way, is the same everywhere.
    """
    known = {**exits, 2: "what was asked for is not possible; a line on standard error says why"}
    told = [f"  {status}  {meaning}" for status, meaning in sorted(known.items())]
    after = "\n".join(["examples:", *(f"  {example}" for example in examples), "", "exit status:", *told])
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}." + (f" {more}" if more else ""),
        epilog=after,
        formatter_class=_Help,
    )
    return parser


class _Help(argparse.HelpFormatter):
    """Wraps the description, and keeps the lines of examples and exit status unless they are too long."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        import textwrap

        lines = text.splitlines()
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent="     ", break_long_words=False, break_on_hyphens=False)
            for line in lines
        )


def add_wide(parser: argparse.ArgumentParser) -> None:
    """Add ``--wide`` to a command that prints tables."""
    parser.add_argument("--wide", action="store_true", help="one line a row, however long: for grep, or a wide window")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False) -> list[str]:
    """Return the lines of a table; text that does not fit its column is wrapped inside the column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    laid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    rows = list(rows)
    for title in head:
        laid.add_column(title, overflow="fold", no_wrap=wide)
    for row in rows:
        laid.add_row(*map(Text, row))
    needed = sum(max(len(row[i]) for row in [head, *rows]) + 2 for i in range(len(head)))
    colours = sys.stdout.isatty()
    console = Console(
        width=needed if wide else columns(), force_terminal=colours, color_system="auto" if colours else None
    )
    with console.capture() as captured:
        console.print(laid)
    return [line.rstrip() for line in captured.get().splitlines()]


def columns() -> int:
    """Return how many columns there are: the terminal's, or COLUMNS, or 80."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def progress(told: str) -> None:
    """Say on standard error what a long command does now, one line a step."""
    print(told, file=sys.stderr, flush=True)


def reader_is_gone() -> int:
    """Let nothing more be written to standard output, whose reader has gone; return the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return LEFT_BY_READER
