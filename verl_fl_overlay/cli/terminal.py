"""What commands write to a terminal, or to a file or pipe in its place: their help, tables, sentences and progress.

Tables are as wide as the terminal, or as COLUMNS says, or 80 columns where there is neither; ``--wide`` gives each row
one line.  Sentences are wrapped on a terminal only: in a pipe each stays one line, so that grep finds it whole.
Colours are on a terminal only, by rich: NO_COLOR, FORCE_COLOR and TERM=dumb mean what they mean to it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

LEFT_BY_READER = 141
"""Exit status after the reader of a pipe has gone: 128 + SIGPIPE, as a shell gives it to other programs."""

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT."""

LEAST = 40
"""The columns that a table's last column needs; with fewer it goes under the others."""


class Parser(argparse.ArgumentParser):
    """The parser of the command line and of each command; what is wrong with the arguments it says in two lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the right arguments stand; exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n{' ' * len(self.prog)}  what it takes: {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help; argparse itself does not tell where that fails."""
        (file or sys.stderr).write(message)


def explain(
    parser: argparse.ArgumentParser, more: str, *, examples: Sequence[str], exits: Mapping[int, str]
) -> argparse.ArgumentParser:
    """Complete the help of a command, whose ``description`` is a summary: what else it does, examples, exit status.

    ``exits`` says what each exit status means; 2, which is for what was asked in a wrong way, is the same everywhere.
    """
    known = {**exits, 2: "what was asked for is not possible; a line on standard error says why"}
    width = max(len(str(status)) for status in known)
    told = [f"  {status:<{width}}  {meaning}" for status, meaning in sorted(known.items())]
    summary = parser.description or ""
    parser.description = f"{summary[0].upper()}{summary[1:]}. {more}"
    parser.epilog = "\n".join(["examples:", *(f"  {example}" for example in examples), "", "exit status:", *told])
    return parser


class _Help(argparse.HelpFormatter):
    """Wraps the description, and keeps the lines of an epilog: an example that is wrapped is none that can be run."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        examples, _, status = text.partition("\n\n")
        heading, *lines = status.splitlines()
        told = [part for line in lines for part in folded(line, " " * (line.rindex("  ") + 2), width=width)]
        return "\n".join([examples, "", heading, *told])


def add_wide(parser: argparse._ActionsContainer) -> None:
    """Add ``--wide`` to a command that prints tables."""
    wide = "one line for each row and sentence, however long: for grep, or a wide window (default: as wide as this one)"
    parser.add_argument("--wide", action="store_true", help=wide)


def columns() -> int:
    """Return how many columns there are: the terminal's, or COLUMNS, or 80."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


class Good(str):
    """A cell, or a title, that says that all is well: green."""

    __slots__ = ()


class Bad(str):
    """A cell, or a title, that says what is wrong: red."""

    __slots__ = ()


_STYLES = {Good: "green", Bad: "bold red"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False) -> list[str]:
    """Return the lines of a table without a frame.

    The last column is for text: it is wrapped, or where it would be narrower than ``LEAST`` and does not fit, it goes
    under the others.  A column of numbers is set right.  ``head`` may be empty.
    """
    rows = list(rows)
    every = [head, *rows] if head else rows
    last = len(every[0]) - 1 if every else 0
    widths = [max(len(row[i]) for row in every) for i in range(last)]
    numbers = [all(_is_number(row[i]) for row in rows) for i in range(last)]
    left = sum(widths) + 2 * last
    room = columns() - left

    def lines_of(row: Sequence[str], style: str) -> Iterator[str]:
        *cells, text = row
        set_out = [cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(cells, widths, numbers, strict=True)]
        painted = [_painted(out, _STYLES.get(type(cell), style)) for cell, out in zip(cells, set_out, strict=True)]
        style = _STYLES.get(type(text), style)
        if wide or room >= min(LEAST, len(text)):
            first, *more = [text] if wide else folded(text, width=room)
            yield "  ".join([*painted, _painted(first, style)]).rstrip()
            yield from (" " * left + _painted(line, style) for line in more)
        else:
            indent = " " * (len(row[0]) - len(row[0].lstrip()) + 4)
            narrow = len("  ".join(set_out).rstrip()) > columns()
            yield from folded(" ".join(cells), indent) if narrow else ["  ".join(painted).rstrip()]
            yield from (_painted(line, style) for line in folded(text, indent, indent))

    return [*(lines_of(head, "bold") if head else ()), *(line for row in rows for line in lines_of(row, ""))]


def sentences(texts: Iterable[str], indent: str = "", *, wide: bool = False) -> list[str]:
    """Return the texts, each a line; on a terminal wrapped, so that no word is cut at its edge."""
    whole = wide or not sys.stdout.isatty()
    return [
        _painted(part, _STYLES.get(type(text), ""))
        for text in texts
        for line in text.splitlines()
        for part in ([f"{indent}{line}"] if whole else folded(f"{indent}{line}", f"{indent}  "))
    ]


def title(text: str) -> str:
    """Return a title, in its colour on a terminal."""
    return _painted(text, _STYLES.get(type(text), "bold"))


def problems(found: Sequence[str], *, wide: bool = False) -> list[str]:
    """Return the problems as a list with a title, or that there are none."""
    return [title(Bad("problems")), *sentences(found, "  ", wide=wide)] if found else [title(Good("no problems"))]


def listed(heading: str, found: Sequence[str], *, wide: bool = False) -> list[str]:
    """Return the texts as a list with a title, after an empty line; nothing where there are none."""
    return ["", title(heading), *sentences(found, "  ", wide=wide)] if found else []


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).replace("e-", "", 1).isdecimal()


def folded(text: str, indent: str = "", first: str = "", width: int = 0) -> list[str]:
    """Return ``text`` in lines that fit, at least one.

    A word that does not fit, such as a path, is not broken: it could not be copied.
    """
    fold = textwrap.TextWrapper(max(width or columns(), len(indent) + 8), first, indent)
    fold.break_on_hyphens = fold.break_long_words = False
    return fold.wrap(text) or [""]


def _painted(text: str, style: str) -> str:
    if not style or not text or not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR")):
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console()
    with console.capture() as captured:
        console.print(Text(text, style), end="", soft_wrap=True)
    return captured.get()


def progress(told: str) -> None:
    """Say on standard error what a long command does now, in one line."""
    print(told, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(told: str) -> Iterator[None]:
    """Say on standard error what begins, and after it how long it took; on a terminal a clock runs meanwhile."""
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            shown = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            clock = Progress(*shown, console=Console(stderr=True), transient=True, redirect_stdout=False)
            stack.enter_context(clock)
            clock.add_task(told, total=None)
        else:
            progress(f"{told} ...")
        yield
    progress(f"{told}: {time.perf_counter() - begun:.0f} s")


def prepare() -> bool:
    """Make the standard streams such that no letter fails to be written; return whether standard output is open.

    A file that is opened where a standard stream is closed would take its number, and a child that is given that number
    would get another file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout is not None


def give_up() -> None:
    """Let nothing more be written to a standard stream that takes nothing more; the interpreter's end would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
