"""Tables in Markdown, and the parts of a file that are generated."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def replaced(text: str, name: str, by: str, made: str) -> str:
    """Return ``text`` with its part ``name``, which is between two comments, replaced by ``made``."""
    before, begin, rest = text.partition(f"<!-- {name}: made by {by} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise SystemExit(f"there is no part named {name}, made by {by}")
    return f"{before}{begin}{made}\n{end}{after}"
