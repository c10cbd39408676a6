"""``check``: whether the hooks hold on a verl, or a transformers, that may not be installed, from its source alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.release import check, sources
from verl_fl_overlay.errors import UnsupportedVerlError

OTHERS = " or ".join(package.distribution for package in pins.PACKAGES.values() if package != pins.VERL)
TARGET = (
    "a version of verl, 'latest', a wheel, an sdist, the folder in which verl/ lies, or CHECKOUT@REF; "
    f"of {OTHERS}: NAME==VERSION, NAME==latest, a wheel, an sdist, or the folder in which it lies"
)


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("check", help="say whether the hooks hold on a release, from its source alone")
    parser.add_argument("target", help=TARGET)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--against", metavar="RELEASE", help="the pinned release to compare with (default: the nearest)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the finding for each hook; return 1 if the overlay would refuse to load."""
    try:
        with sources.opened(options.target) as tree, sources.PinnedReleases() as pinned:
            report = check.check(tree, options.against, pinned.tree)
    except UnsupportedVerlError as refusal:  # an answer, as that of another verl on which the overlay does not load
        print(json.dumps({"verdict": str(refusal), "holds": False}, indent=1) if options.json else refusal)
        return 1
    print(json.dumps(check.as_json(report), indent=1) if options.json else check.as_text(report))
    return 0 if report.holds else 1
