"""Print the matrix from its results: ``python .ci/matrix.py out/compat [--markdown]``.

A row is a JSON file with a JUnit file beside it.  What has no result says "not run"; exit status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

AREAS = ("contract", "train", "flaggems", "logprobs", "gpu")


def outcomes(junit: Path) -> dict[str, Counter[str]]:
    """Return, per folder of tests, how many passed, failed and were skipped."""
    counted: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        area = (case.get("classname", "") or case.get("name", "")).split(".")[1:2]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counted.setdefault(area[0] if area else "?", Counter())[outcome] += 1
    return counted


def cell(counts: Counter[str] | None) -> str:
    """Say in a word or two how a folder of tests went."""
    if not counts or not (counts["passed"] or counts["failed"]):
        return "not run"
    if counts["failed"]:
        return f"{counts['failed']} FAILED"
    return f"{counts['passed']} passed" + (f", {counts['skipped']} skipped" if counts["skipped"] else "")


def row(result: Path) -> list[str]:
    """Return the cells of one row."""
    about = json.loads(result.read_text())
    junit = result.with_suffix(".xml")
    counts = outcomes(junit) if junit.exists() else {}
    cells = [cell(counts.get(area)) for area in AREAS]
    note = about.get("not run", "" if counts else "stopped before its tests")
    return [about["verl"], about["torch"], about["device"], about["python"], *cells, note]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    head = ["verl", "torch", "device", "python", *AREAS, "note"]
    table = [row(result) for result in sorted(options.folder.glob("*.json"))]
    if options.markdown:
        for cells in [head, ["---"] * len(head), *table]:
            print("| " + " | ".join(cells) + " |")
    else:
        widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
        for cells in [head, *table]:
            print("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
    return 1 if not table or any("FAILED" in text for cells in table for text in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
