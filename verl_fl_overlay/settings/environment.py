"""``env``: the whole stack's environment as one table, with what each variable does and what is wrong with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from verl_fl_overlay.settings import Settings, every_variable, misspelt, shown
from verl_fl_overlay.settings.conflicts import conflicts, contradictions
from verl_fl_overlay.settings.readers import Variable
from verl_fl_overlay.settings.stack import OF_ONE_PROCESS

LOADED_BY = "VERL_USE_EXTERNAL_MODULES"
OVERLAY = "verl_fl_overlay"


def examine(environment: Mapping[str, str], phase: str = "") -> dict[str, Any]:
    """Return the variables of ``phase`` ("training", "rollout"; "" for all), the errors and the warnings."""
    settings, problems = Settings.parse(environment)
    readable, _ = Settings.parse({name: settings.given[name] for name in settings.parsed})
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
        "errors": problems + contradictions(settings),
        "warnings": [*misspelt(environment), *conflicts(readable)],
    }


def of_phase(phase: str) -> list[Variable[Any]]:
    """Return the variables that are read in ``phase`` or in all phases; every one for ""."""
    return [v for v in every_variable().values() if not phase or v.phase in (phase, "common")]


def _value(variable: Variable[Any], settings: Settings) -> str:
    if variable.name in settings.given:
        return shown(variable.name, settings.given[variable.name])
    default = variable.default
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if default in (None, {}) else str(default)


def as_text(result: dict[str, Any]) -> str:
    """Lay out as aligned text: what was set first, then the defaults, by component."""
    lines: list[str] = []
    for source, title in (("environment", "set"), ("default", "not set")):
        rows = [row for row in result["variables"] if row["source"] == source]
        lines += ["", f"{title}: {'nothing' if not rows else ''}".rstrip()]
        for component in dict.fromkeys(row["component"] for row in rows):
            lines.append(f"  {component}")
            lines += [_line(row) for row in rows if row["component"] == component]
    for severity in ("errors", "warnings"):
        if result[severity]:
            lines += ["", severity, *(f"  {finding}" for finding in result[severity])]
    if not result["errors"] and not result["warnings"]:
        lines += ["", "no conflicts"]
    return "\n".join(lines[1:])


def _line(row: dict[str, Any]) -> str:
    return f"    {row['name'] + '=' + row['value']:<44} {row['phase']:<9} {row['effect']} [{row['allowed']}]"


def as_exports(environment: Mapping[str, str], phase: str = "") -> str:
    """Return shell lines that give another process the variables that are set here, and the overlay with them."""
    of_other_phases = every_variable().keys() - {variable.name for variable in of_phase(phase)}
    wanted = {name: text for name, text in forwarded(environment).items() if name not in of_other_phases}
    return "\n".join(f"export {name}={shlex.quote(text)}" for name, text in wanted.items())


def summary(settings: Settings) -> str:
    """Return which parts of the stack are on, such as ``FL[training(TE_FL=flagos), FlagGems, FlagCX]``."""
    own = settings["TRAINING_FL_FLAGGEMS_ENABLE"]
    parts = [
        f"training(TE_FL={settings['TE_FL_PREFER']})" if "TE_FL_PREFER" in settings.given else "",
        f"rollout(VLLM_FL={settings['VLLM_FL_PREFER']})" if "VLLM_FL_PREFER" in settings.given else "",
        "FlagGems" if (settings["USE_FLAGGEMS"] if own is None else own) else "",
        "FlagCX" if settings["USE_FLAGCX"] else "",
    ]
    return f"FL[{', '.join(filter(None, parts)) or 'disabled'}]"


def as_json(result: dict[str, Any]) -> str:
    """Return the table as JSON."""
    return json.dumps(result, indent=1, ensure_ascii=False)


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables another process of the same run needs: the table's that are set, and what loads the overlay.

    FlagCX has dozens more than the table, so whatever begins as its own do goes along, but for what tells one node or
    rank from another.  Nothing else of the environment is copied, and no value that carries a password.
    """
    settings, _ = Settings.parse(environment)
    flagcx = {n: text for n, text in environment.items() if n.startswith("FLAGCX_") and n not in OF_ONE_PROCESS}
    given = {name: text for name, text in {**settings.given, **flagcx}.items() if "://***@" not in shown(name, text)}
    modules = [module for module in given.get(LOADED_BY, "").split(",") if module.strip()]
    if OVERLAY not in modules:
        modules.append(OVERLAY)
    return {**given, LOADED_BY: ",".join(modules)}
