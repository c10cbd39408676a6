"""Put results of tools/gpu.py into docs: ``python tools/gpu_page.py [out/gpu] [--check]`` writes docs/gpu.md.

The results in the folder, if there is one, are first copied to docs/measurements/gpu-CARD-DATE.json; the page is made
from these alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu import ITEMS, RESULTS, words
from tables import DOCS, markdown, replaced

PAGE = DOCS / "gpu.md"
KEPT = DOCS / "measurements"


def copied(folder: Path, kept: Path) -> None:
    """Copy the results of every card in a folder."""
    for file in sorted(folder.glob(f"*/{RESULTS}")):
        text = file.read_text(encoding="utf-8")
        if json.loads(text)["cards"]:
            (kept / f"gpu-{file.parent.name}.json").write_text(text + "\n", encoding="utf-8")


def made(kept: Path) -> str:
    """Return the tables: what ran on which card and how it ended, and what was there."""
    results: list[dict[str, Any]] = [json.loads(file.read_text()) for file in sorted(kept.glob("gpu-*.json"))]
    heads = [f"{found['cards']} x {found['device']}, {found['date']}" for found in results]
    rows = []
    for item in ITEMS:
        told = [found["items"].get(item.name, {"outcome": "not run", "why": ""}) for found in results]
        rows.append([f"`{item.name}`", *(map(words, told) if told else ["not run"])])
    outcomes = markdown(["", *(heads or ["on any card"])], rows)
    there = []
    for head, found in zip(heads, results, strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        commits = ", ".join(sorted({row["commit"] for row in found["items"].values()} - {""}))
        there.append([head, found["driver"] or "-", commits or "not known", versions])
    return "\n\n".join([outcomes, *([markdown(["", "driver", "commit", "versions"], there)] if there else [])])


def main() -> int:
    """Write the page, or with --check only tell whether it has to be; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of results that are to be shown too")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    options = parser.parse_args()
    if options.folder and not options.check:
        copied(options.folder, KEPT)
    text = PAGE.read_text(encoding="utf-8")
    new = replaced(text, "gpu", "nox -s report", made(KEPT))
    if options.check:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
