"""``env``: the whole stack's environment as one table, with what each variable does and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from verl_fl_overlay.cli import terminal, values
from verl_fl_overlay.settings import TABLE, Settings
from verl_fl_overlay.settings.conflicts import conflicts
from verl_fl_overlay.settings.loading import forwarded, kept_back
from verl_fl_overlay.settings.table import contradictions, misspelt, of_phase, shown
from verl_fl_overlay.settings.variables import Variable

HINT = "verl-fl env: for another shell or a job: verl-fl env --sh > fl.env, and there: . ./fl.env"


def add(env: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "What is set stands first, then the defaults by component, then what is wrong: values that are not allowed, "
        "misspelt names and variables that contradict each other. Passwords are not shown."
    )
    examples = (
        "verl-fl env",
        "verl-fl env --phase rollout --wide | grep BLACKLIST",
        "verl-fl env --json > env.json",
        "verl-fl env --sh > env.sh  # in another shell, or elsewhere: . ./env.sh",
    )
    exits = {0: "all values are allowed; there may be warnings", 1: "a value is not allowed, or two contradict"}
    terminal.explain(env, more, examples=examples, exits=exits)
    phase = "show what is read in this phase, training or rollout (default: in either)"
    env.add_argument("--phase", choices=["training", "rollout"], default="", help=phase)
    form = env.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: tables)")
    exports = "print what is set here as exports, and the one that makes verl load the overlay: verl-fl env --sh > "
    exports += 'fl.env, and in another shell or a job: . ./fl.env; in this shell: eval "$(verl-fl env --sh)"'
    form.add_argument("--sh", action="store_true", help=exports)
    terminal.add_wide(form)
    env.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table; return 1 if a value is not allowed."""
    result = examine(os.environ, options.phase)
    if options.sh:
        print(as_exports(os.environ, options.phase))
        for error in result["errors"]:
            print(f"verl-fl env: {error}", file=sys.stderr)
    else:
        print(json.dumps(result, indent=1) if options.json else as_text(result, options.wide))
    if sys.stdout.isatty():
        print(HINT, file=sys.stderr)
    return 1 if result["errors"] else 0


def examine(environment: Mapping[str, str], phase: str = "") -> dict[str, Any]:
    """Return the variables of ``phase`` ("training", "rollout"; "" for all), the errors and the warnings."""
    settings, problems = Settings.parse(environment)
    readable, _ = Settings.parse({name: settings.given[name] for name in settings.parsed})
    refused, doubtful = values.judged(readable)
    rows = [
        {
            "name": variable.name,
            "component": variable.component + (f" >= {variable.since}" if variable.since else ""),
            "phase": variable.phase,
            "value": _value(variable, settings),
            "source": "environment" if variable.name in settings.given else "default",
            "allowed": variable.allowed,
            "effect": variable.help,
        }
        for variable in of_phase(phase)
    ]
    return {
        "variables": rows,
        "not in the table": {n: shown(n, text) for n, text in sorted(forwarded(environment).items()) if n not in TABLE},
        "kept back": kept_back(environment),
        "errors": [*problems, *contradictions(settings), *refused],
        "warnings": [*misspelt(environment), *conflicts(readable), *doubtful],
    }


def _value(variable: Variable[Any], settings: Settings) -> str:
    if variable.name in settings.given:
        return shown(variable.name, settings.given[variable.name])
    default = variable.default
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if default in (None, {}) else str(default)


def as_text(result: dict[str, Any], wide: bool = False) -> str:
    """Lay out as tables: what was set first, then the defaults, by component; then what is wrong."""
    lines: list[str] = []
    for source, heading in (("environment", "set"), ("default", "not set")):
        rows = [row for row in result["variables"] if row["source"] == source]
        lines += ["", terminal.title(f"{heading}: {'nothing' if not rows else ''}".rstrip())]
        for component in dict.fromkeys(row["component"] for row in rows):
            cells = [
                (f"    {row['name']}={row['value']}", row["phase"], f"{row['effect']} [{row['allowed']}]")
                for row in rows
                if row["component"] == component
            ]
            lines += [f"  {component}", *terminal.table((), cells, wide=wide)]
    for heading, name in (
        ("set, not in the table, and given to Ray's workers:", "not in the table"),
        ("not given to other processes:", "kept back"),
    ):
        told = [(f"    {variable}", text) for variable, text in result[name].items()]
        lines += ["", terminal.title(heading), *terminal.table((), told, wide=wide)] if told else []
    for name in ("errors", "warnings"):
        lines += terminal.listed(terminal.Bad(name), result[name], wide=wide)
    if not result["errors"] and not result["warnings"]:
        lines += ["", terminal.title(terminal.Good("no conflicts"))]
    return "\n".join(lines[1:])


def as_exports(environment: Mapping[str, str], phase: str = "") -> str:
    """Return shell lines that give another process the variables that are set here, and make verl load the overlay."""
    of_other_phases = TABLE.keys() - {variable.name for variable in of_phase(phase)}
    wanted = {name: text for name, text in forwarded(environment).items() if name not in of_other_phases}
    return "\n".join(f"export {name}={shlex.quote(text)}" for name, text in wanted.items())
