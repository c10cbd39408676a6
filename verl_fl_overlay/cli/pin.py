"""``pin``: the fingerprints of a release of verl, or of another package with hooks, from its source alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from verl_fl_overlay.cli.check import TARGET
from verl_fl_overlay.compat.release import pinning, sources
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.files import write_whole


def add(commands: Any) -> None:
    """Add the command."""
    pin = commands.add_parser("pin", help="print the pins of a release, from its source alone")
    pin.add_argument("target", help=TARGET)
    pin.add_argument("--write", action="store_true", help="write them to compat/pins of this checkout")
    pin.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the pins, or write them into the checkout that this overlay runs from.

    Nothing is written, and 1 is returned, if something that is pinned is missing in this release.

    Raises:
        OverlayError: ``--write`` where the overlay is installed, and not a checkout.
    """
    folder = Path(pinning.__file__).resolve().parents[1]
    if options.write and not (folder.parent / "pyproject.toml").is_file():
        raise OverlayError(f"--write is for a checkout, and {folder} is in none; there: pip install -e .")
    with sources.opened(options.target) as tree:
        package, version, pins = tree.package, tree.version, pinning.pins_of(tree)
    missing = pinning.missing(pins)
    if options.write and missing:
        lacks = f"{package.distribution} {version} has no {', no '.join(missing)}"
        print(f"verl-fl pin: nothing was written; {lacks}", file=sys.stderr)
        return 1
    if options.write:
        file = folder / package.folder / f"{version}.json"
        file.parent.mkdir(exist_ok=True)
        write_whole(file, pinning.as_text(pins))  # a file there is a release, so half of one would be too
        print(file)
    else:
        print(pinning.as_text(pins), end="")
    return 0
