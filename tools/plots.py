"""Draw the plots of docs/performance.md from docs/measurements: ``python tools/plots.py [--check]``.

The measurements are what ``benchmarks/realistic.py --json`` writes.  The plots are plain SVG, which has its own ground
and so can be read on a light page and on a dark one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tables import DOCS, ROOT

LABELS = {
    "padded": "verl, padded, no flash-attn (an earlier run)",
    "packed flash-attn": "verl, flash-attn",
    "packed flash-attn liger": "verl, flash-attn, Liger, fused Adam",
    "packed overlay": "overlay, no flash-attn",
    "packed overlay recompute none": "overlay, VERL_FL_RECOMPUTE=none",
}
"""Row of the benchmark -> what the plot calls it."""

MEASURES = {"train": "one update", "train with entropy": "with entropy"}
PLOTS = {
    "step-time": ("ms", "One update, milliseconds", "{:,.0f}"),
    "peak-memory": ("peak GB", "Most GPU memory in an update, GB", "{:.1f}"),
}
"""File -> the benchmark's key, what it is, and how a number is written."""

STYLE = """
text { font: 13px sans-serif; fill: #1f2328 } .title { font-weight: bold } .ground { fill: #ffffff }
.train { fill: #4051b5 } .entropy { fill: #9fa8da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e6e6 } .ground { fill: #1e2129 } .train { fill: #7e8ce0 } .entropy { fill: #4a5590 }
}"""
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 300, 110, 16, 12, 60


def measured() -> dict[str, dict[str, Any]]:
    """Return row -> what it measured on the H100."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((DOCS / "measurements").glob("realistic-h100-*.json")):
        found |= {row: runs[0] for row, runs in json.loads(file.read_text(encoding="utf-8")).items()}
    return found


def plot(key: str, title: str, form: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return one plot: a bar for each row and measure, with its number; or why there is none."""
    values = {(row, name): rows[row][name].get(key) for row in LABELS for name in MEASURES}
    scale = (WIDTH - LEFT - RIGHT) / max(value for value in values.values() if value is not None)
    height = TOP + len(LABELS) * (2 * BAR + GAP)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}\n</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
    ]
    for place, (name, label) in enumerate(MEASURES.items()):
        x, kind = LEFT + 130 * place, "entropy" if "entropy" in name else "train"
        drawn.append(f'<rect class="{kind}" x="{x}" y="34" width="12" height="12"/>')
        drawn.append(f'<text x="{x + 18}" y="45">{escape(label)}</text>')
    for number, (row, label) in enumerate(LABELS.items()):
        y = TOP + number * (2 * BAR + GAP)
        drawn.append(f'<text x="12" y="{y + BAR + 4}">{escape(label)}</text>')
        for place, name in enumerate(MEASURES):
            value, kind = values[row, name], "entropy" if "entropy" in name else "train"
            length = 0 if value is None else value * scale
            said = rows[row][name].get("error", "not measured") if value is None else form.format(value)
            top = y + place * BAR
            drawn.append(f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR - 2}"/>')
            drawn.append(f'<text x="{LEFT + length + 6:.1f}" y="{top + 12}">{escape(said)}</text>')
    return "\n".join([*drawn, "</svg>", ""])


def main() -> int:
    """Write the plots, or with --check only tell whether one is not up to date; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    check, rows, outdated = parser.parse_args().check, measured(), 0
    for name, (key, title, form) in PLOTS.items():
        file: Path = DOCS / "plots" / f"{name}.svg"
        made = plot(key, title, form, rows)
        if file.is_file() and file.read_text(encoding="utf-8") == made:
            continue
        outdated = 1
        if not check:
            file.write_text(made, encoding="utf-8")
            print(file.relative_to(ROOT))
    return outdated if check else 0


if __name__ == "__main__":
    raise SystemExit(main())
