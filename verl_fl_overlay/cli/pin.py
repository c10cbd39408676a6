"""``pin``: the fingerprints of a release of verl, or of another package with hooks, from its source alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verl_fl_overlay.cli import terminal
from verl_fl_overlay.cli.check import TARGET
from verl_fl_overlay.compat.release import pinning, sources
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.files import write_whole


def add(pin: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "The pins are JSON: of each function that is hooked its kind, its parameters and a digest. They are for who "
        "ports the overlay to another release; --write puts them into the checkout that this command runs from."
    )
    examples = ("verl-fl pin 0.9.1", "verl-fl pin transformers==5.10.4 --write")
    exits = {0: "the pins were printed or written", 1: "with --write: something is missing, and nothing was written"}
    terminal.explain(pin, more, examples=examples, exits=exits)
    pin.add_argument("target", metavar="TARGET", help=TARGET)
    pin.add_argument("--write", action="store_true", help="write them to compat/pins of this checkout (default: print)")
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
