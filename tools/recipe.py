"""The command that the recipe of GRPO with vLLM runs, for a page to show: ``command()``.

It is read from the recipe, with the defaults of its variables; a test holds that the recipe runs exactly this.
"""

from __future__ import annotations

import re

from tables import ROOT

RECIPE = ROOT / "examples" / "recipes" / "grpo_vllm.sh"
EXPORTS = "export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay VERL_FL_REPORT_DIR=$OUT/reports"


def command() -> str:
    """Return the lines to type, the recipe's variables replaced by their defaults."""
    text = RECIPE.read_text(encoding="utf-8")
    values = dict(re.findall(r'^: "\$\{(\w+):=(.*?)\}"', text, re.MULTILINE))
    _, _, rest = text.partition("overrides=(\n")
    lines = [line.partition(" #")[0].strip().replace('"', "") for line in rest.partition("\n)\n")[0].splitlines()]
    (run,) = re.findall(r"^train (.*?) \"\$\{overrides\[@\]\}", text, re.MULTILINE)

    def filled(line: str) -> str:
        made = re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), line)
        return made if made == line else filled(made)

    return f"{filled(EXPORTS)}\n" + " \\\n    ".join([run, *map(filled, lines)])
