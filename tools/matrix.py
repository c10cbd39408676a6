"""The matrix, from its results: ``python tools/matrix.py out/compat`` prints it and writes it into docs/matrix.md.

A row is a JSON file, which says what it ran on, and a JUnit file beside it.  A row without a result says "not run".
The exit status is 1 if a row failed that must not fail.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from junit import cases
from tables import DOCS, markdown, replaced

PAGE = DOCS / "matrix.md"
HEAD = ["verl", "torch", "Python", "flag_gems", "wrapt", "tests that passed", "date"]


def outcomes(junit: Path) -> dict[str, Counter[str]]:
    """Return, per folder of tests, how many passed, failed and were skipped."""
    counted: dict[str, Counter[str]] = {}
    for case in cases(junit):
        counted.setdefault(case.folder, Counter())[case.outcome] += 1
    return counted


def went_wrong(counts: dict[str, Counter[str]]) -> bool:
    """Tell whether a test failed, or no test ran."""
    return not counts or any(count["failed"] for count in counts.values())


def result(about: dict[str, Any], counts: dict[str, Counter[str]]) -> tuple[str, str]:
    """Say in words how a row went, by folders of tests, and on which day."""
    if "not run" in about:
        return f"not run: {about['not run']}".removesuffix(": "), ""
    said = []
    for area, count in counts.items():
        more = [f"{count[word]} {word}" for word in ("failed", "skipped") if count[word]]
        said.append(f"{area} {count['passed']}" + (f" ({', '.join(more)})" if more else ""))
    words = ", ".join(said) or about.get("failed", "FAILED before its tests")
    allowed = " - it may" if "may fail" in about and went_wrong(counts) else ""
    return words + allowed, about["date"]


def printed(table: list[list[str]]) -> str:
    """Return the table for a terminal: under each row its tests, as wide as the terminal is."""
    columns = shutil.get_terminal_size().columns
    told = [[*cells[:5], cells[6]] for cells in [HEAD, *table]]
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip() for cells in told]
    tests = [textwrap.fill(cells[5], columns, initial_indent="    ", subsequent_indent="    ") for cells in table]
    return "\n".join([lines[0], *(f"{line}\n{below}" for line, below in zip(lines[1:], tests, strict=True))])


def main() -> int:
    """Print the table and write it into its page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="print these alone, files without suffix; write nothing")
    options = parser.parse_args()
    rows = []
    for file in sorted(options.folder.glob("*.json"), key=lambda file: (not file.stem.startswith("verl"), file.stem)):
        if options.rows and file.stem not in options.rows:
            continue
        about, junit = json.loads(file.read_text()), file.with_suffix(".xml")
        rows.append((about, outcomes(junit) if junit.exists() else {}))
    rows.sort(key=lambda row: [int(number) for number in re.findall(r"\d+", row[0]["verl"])])
    table = [[*(about[name.lower()] for name in HEAD[:5]), *result(about, counts)] for about, counts in rows]
    print(printed(table))
    if not options.rows:
        text = replaced(PAGE.read_text(encoding="utf-8"), "matrix", "nox -s report", markdown(HEAD, table))
        PAGE.write_text(text, encoding="utf-8")
    counted = [counts for about, counts in rows if not {"not run", "may fail"} & set(about)]
    return int(not rows or any(map(went_wrong, counted)))


if __name__ == "__main__":
    raise SystemExit(main())
