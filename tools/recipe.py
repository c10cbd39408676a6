"""The command that the recipe of GRPO with vLLM runs: ``command()`` for a page to show, ``overrides()`` to run.

It is read from the recipe, with the defaults of its variables; a test holds that the recipe runs exactly this.
"""

from __future__ import annotations

import re

from tables import ROOT

RECIPE = ROOT / "examples" / "recipes" / "grpo_vllm.sh"
EXPORTS = "export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay VERL_FL_REPORT_DIR=$OUT/reports"


def overrides(**values: object) -> list[str]:
    """Return what the recipe passes to verl, its variables being ``values``, or else their defaults."""
    return [_filled(line, **values).replace("'", "") for line in _lines()]


def command() -> str:
    """Return the lines to type, the recipe's variables replaced by their defaults."""
    (run,) = re.findall(r"^train (.*?) \"\$\{overrides\[@\]\}", _text(), re.MULTILINE)
    return f"{_filled(EXPORTS)}\n" + " \\\n    ".join([run, *map(_filled, _lines())])


def _text() -> str:
    return RECIPE.read_text(encoding="utf-8")


def _lines() -> list[str]:
    """Return the recipe's overrides, which may have single quotes for a shell, and have its variables' names."""
    _, _, rest = _text().partition("overrides=(\n")
    return [line.partition(" #")[0].strip().replace('"', "") for line in rest.partition("\n)\n")[0].splitlines()]


def _filled(line: str, **values: object) -> str:
    known = {**dict(re.findall(r'^: "\$\{(\w+):=(.*?)\}"', _text(), re.MULTILINE)), **values}
    made = re.sub(r"\$(\w+)", lambda found: str(known.get(found[1], found[0])), line)
    return made if made == line else _filled(made, **values)
