"""``dispatch``: the configuration file of a plugin for rollout, checked or made from the environment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verl_fl_overlay.dispatch import file, lint, render
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import PLUGINS

ENGINES = {plugin.engine.lower(): plugin for plugin in PLUGINS}


def add(commands: Any) -> None:
    """Add the command with its two actions."""
    dispatch = commands.add_parser("dispatch", help="check or write the file of vllm-plugin-FL or sglang-plugin-FL")
    actions = dispatch.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="say what the plugin would ignore or take for something else")
    check.add_argument("file", type=Path)
    check.set_defaults(run=run_check)
    make = actions.add_parser("render", help="print the file that does what the environment asks for")
    make.add_argument("--vendor", default="", help="FlagGems' name of the chip's vendor; found, if not given")
    make.set_defaults(run=run_render)
    for action in (check, make):
        action.add_argument("--engine", choices=list(ENGINES), default="vllm", help="whose plugin; vllm, if not given")


def run_check(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if one of them is more than a note."""
    try:
        content, plugin = file.read(options.file), ENGINES[options.engine]
        findings = [*lint.check(content, plugin), *lint.unread_lists(options.file, content, plugin)]
    except OverlayError as error:
        findings = [str(error)]
    faults = [finding for finding in findings if not finding.startswith(lint.NOTE)]
    print("\n".join([*findings, *([] if faults else [f"{options.file}: no faults"])]))
    return 1 if faults else 0


def run_render(options: argparse.Namespace) -> int:
    """Print the file."""
    print(render.render(Settings.from_environment(), options.vendor, ENGINES[options.engine]), end="")
    return 0
