"""Write docs/engines.md from results: ``python tools/engines.py out/engines``.

A result is the JUnit file of ``pytest tests/engines``, one per release and device: 0.9.1-cpu.xml, 0.9.1-cuda.xml.
Cells without a result in the folder stay as they were.  The exit status is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from junit import Case, cases
from tables import DOCS, markdown

TABLE = DOCS / "engines.md"
COLUMNS = {
    ("cpu", "test_hooks_on_the_real_class"): "hooks on the real class",
    ("cpu", "test_phase_on_in_training"): "training, CPU",
    ("cpu", "test_phase_on_in_inference"): "inference, CPU",
    ("cuda", "test_phase_on_in_training"): "training, GPU",
    ("cuda", "test_phase_on_in_inference"): "inference, GPU",
}
KEY = ["verl", "backend", "head"]
HEAD = [*KEY, *COLUMNS.values()]
INTRODUCTION = """# What was run with each engine and worker

Made by `tools/engines.py` from the results of `nox -s engines` (on a GPU: `pytest tests/engines`), not by hand.
Training and inference "passed" means that verl's real engine or worker did it, with the training phase on in every
forward pass and off after it.  Megatron has its own local layers there, since TransformerEngine was not installed; on a
CPU, what it asks torch.cuda is answered for the CPU.
"""


def said(case: Case) -> str:
    """Return the text of a cell for one test."""
    if case.outcome == "skipped":
        return "not in that release" if case.why.startswith("not in verl") else f"not run ({case.why})"
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
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {tuple(row[: len(KEY)]): dict(zip(HEAD, row, strict=True)) for row in rows[2:]}


def row(key: tuple[str, ...], known: dict[str, str]) -> list[str]:
    """Return a row; an engine that the release lacks is marked so on every device."""
    lacking = "not in that release" in known.values()
    nothing = "not in that release" if lacking else "not run (no result)"
    return [*key, *(nothing if lacking else known.get(column, nothing) for column in COLUMNS.values())]


def main() -> int:
    """Write the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    rows = before()
    for key, known in results(parser.parse_args().folder).items():
        rows[key] = {**rows.get(key, {}), **known}
    table = [row(key, known) for key, known in sorted(rows.items())]
    TABLE.write_text(f"{INTRODUCTION}\n{markdown(HEAD, table)}\n", encoding="utf-8")
    failed = [" ".join(cells[: len(KEY)]) for cells in table if "FAILED" in cells]
    print(f"{TABLE}: {len(table)} rows, failed: {', '.join(failed) or 'none'}")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    raise SystemExit(main())
