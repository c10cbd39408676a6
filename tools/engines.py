"""Write docs/engines.md from results: ``python tools/engines.py out/engines``.

A result is the JUnit file of ``pytest tests/engines``, one per release and device: 0.9.1-cpu.xml, 0.9.1-cuda.xml.
Cells without a result in the folder stay as they were, and an engine that a release lacks has no row.  The exit status
is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from junit import Case, cases
from tables import DOCS, markdown, replaced

PAGE = DOCS / "engines.md"
COLUMNS = {
    ("cpu", "test_hooks_on_the_real_class"): "hooks on the real class",
    ("cpu", "test_phase_on_in_training"): "training, CPU",
    ("cpu", "test_phase_on_in_inference"): "inference, CPU",
    ("cuda", "test_phase_on_in_training"): "training, GPU",
    ("cuda", "test_phase_on_in_inference"): "inference, GPU",
}
KEY = ["verl", "backend", "head"]
HEAD = [*KEY, *COLUMNS.values()]
LACKING = "not in that release"


def said(case: Case) -> str:
    """Return the text of a cell for one test."""
    if case.outcome == "skipped":
        return LACKING if case.why.startswith("not in verl") else f"not run ({case.why})"
    return case.outcome.replace("failed", "FAILED")


def results(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return (release, backend, head) -> column -> cell."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for file in sorted(folder.glob("*.xml")):
        release, device = file.stem.rsplit("-", 1)
        for case in cases(file):
            match = re.fullmatch(r"(\w+)\[(.+) (\w+)\]", case.name)
            if match and (device, match[1]) in COLUMNS:
                found.setdefault((release, match[2], match[3]), {})[COLUMNS[device, match[1]]] = said(case)
    return found


def before() -> dict[tuple[str, ...], dict[str, str]]:
    """Return the cells of the table as it is now."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {tuple(row[: len(KEY)]): dict(zip(HEAD, row, strict=True)) for row in rows[2:]}


def main() -> int:
    """Write the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    rows = before()
    for key, known in results(parser.parse_args().folder).items():
        rows[key] = {**rows.get(key, {}), **known}
    table = [
        [*key, *(known.get(column, "not run") for column in COLUMNS.values())]
        for key, known in sorted(rows.items())
        if LACKING not in known.values()
    ]
    text = replaced(PAGE.read_text(encoding="utf-8"), "engines", "nox -s engines", markdown(HEAD, table))
    PAGE.write_text(text, encoding="utf-8")
    failed = [" ".join(cells[: len(KEY)]) for cells in table if "FAILED" in cells]
    print(f"{PAGE}: {len(table)} rows, failed: {', '.join(failed) or 'none'}")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    raise SystemExit(main())
