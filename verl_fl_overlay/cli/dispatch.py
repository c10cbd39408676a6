"""``dispatch``: the configuration file of a plugin for rollout, checked or made from the environment."""

from __future__ import annotations

import argparse
from pathlib import Path

from verl_fl_overlay.cli import terminal
from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch import file, lint, render
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import PLUGINS

ENGINES = {plugin.engine.lower(): plugin for plugin in PLUGINS}


def add(dispatch: argparse.ArgumentParser) -> None:
    """Add the two actions."""
    more = "The plugins for rollout read a YAML file; check finds in one what a plugin would ignore, render makes one."
    file_of = "verl-fl dispatch render --vendor nvidia > mine.yaml"
    exits = {0: "check: no faults; render: printed", 1: "check: a fault"}
    terminal.explain(dispatch, more, examples=(file_of, "verl-fl dispatch check mine.yaml"), exits=exits)
    actions = dispatch.add_subparsers(dest="action", required=True, metavar="ACTION", help="check or render")
    summary = "say what the plugin would ignore or take for something else"
    check = actions.add_parser("check", help=summary, description=summary)
    more = (
        "Keys and values are compared with those of the plugin; lists that this version of it reads elsewhere are told."
    )
    examples = ("verl-fl dispatch check mine.yaml", "verl-fl dispatch check --engine sglang mine.yaml")
    terminal.explain(check, more, examples=examples, exits={0: "no faults; there may be notes", 1: "a fault"})
    check.add_argument("file", type=Path, metavar="FILE", help="the YAML file, at most 64 KiB")
    check.set_defaults(run=run_check)
    summary = "print the file that does what the environment asks for"
    make = actions.add_parser("render", help=summary, description=summary)
    more = (
        "It adds the environment's lists and preferences to the plugin's own file for the chip, or to the file that "
        "VLLM_FL_CONFIG or SGLANG_FL_CONFIG names."
    )
    examples = (file_of, "verl-fl dispatch render --engine sglang --vendor metax")
    terminal.explain(make, more, examples=examples, exits={0: "the file was printed"})
    vendor = f"the chip's vendor by FlagGems' name: {', '.join(chips.CHIPS)} (default: the chip that is here)"
    make.add_argument("--vendor", default="", help=vendor)
    make.set_defaults(run=run_render)
    for action in (check, make):
        engine = f"whose plugin: {' or '.join(ENGINES)} (default: %(default)s)"
        action.add_argument("--engine", choices=list(ENGINES), default="vllm", help=engine)


def run_check(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if one of them is more than a note.

    Raises:
        OverlayError: PyYAML is not installed, so nothing can be said of the file.
    """
    file.pyyaml()
    try:
        content, plugin = file.read(options.file), ENGINES[options.engine]
        findings = [*lint.check(content, plugin), *lint.unread_lists(options.file, content, plugin)]
    except OverlayError as error:
        findings = [str(error)]
    faults = [finding for finding in findings if not finding.startswith(lint.NOTE)]
    print("\n".join(terminal.sentences([*findings, *([] if faults else [f"{options.file}: no faults"])])))
    return 1 if faults else 0


def run_render(options: argparse.Namespace) -> int:
    """Print the file."""
    print(render.render(Settings.from_environment(), options.vendor, ENGINES[options.engine]), end="")
    return 0
