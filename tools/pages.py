"""Write the parts of README.md and docs/ that are made from the code: ``python tools/pages.py [--check]``."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping

import recipe
from tables import DOCS, README, ROOT, markdown, replaced

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the tables are this checkout's, also where another overlay is installed

from verl_fl_overlay import cli, compat
from verl_fl_overlay.cli.install_hint import MAKE
from verl_fl_overlay.devices.chips import CHIPS, CPU, KNOWN_TO_VERL, Chip
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.settings import VARIABLES
from verl_fl_overlay.settings.stack import STACK

AREAS = {
    "engine": "verl's engines, and the training phase",
    "attention": "Attention of packed sequences",
    "recompute": "Recomputing activations",
    "activations": "Offloaded activations",
    "megatron": "Megatron's own layers",
    "te_fl": "TransformerEngine-FL",
    "logprobs": "Log-probs",
    "entropy": "Entropy",
    "head": "Logits a part at a time",
    "ray": "Variables of Ray's workers",
    "rollout": "Rollout",
    "flagcx": "FlagCX",
    "chip": "Chips without a platform in verl",
    "cpu": "Training on a CPU",
    "legacy": "Workers of verl 0.7",
}
"""What a hook's name begins with -> what these hooks are about."""


def by_release() -> dict[str, tuple[Hook, ...]]:
    """Return release -> its hooks."""
    return {release: compat.select(compat.InstalledVerl(release, "")).hooks for release in compat.RELEASES}


def hooks(releases: Mapping[str, Iterable[Hook]]) -> str:
    """Return the tables of hooks, one for each area: the texts of each hook, and the releases that have it.

    A hook has one row, or several if it differs between releases, for example in its target.
    """
    having: dict[tuple[str, ...], list[str]] = {}
    for release, chosen in releases.items():
        for hook in chosen:
            target = f"[`{hook.module.removeprefix('verl.')}:{hook.attribute}`]({hook.upstream})"
            said = (hook.name, target, "yes" if hook.required else "no", hook.why, hook.until)
            having.setdefault(said, []).append(release)
    names = list(dict.fromkeys(name for name, *_ in having))
    areas: dict[str, list[list[str]]] = {}
    for (name, target, *more), where in sorted(having.items(), key=lambda row: names.index(row[0][0])):
        cells = [f"`{name}`<br>{target}", "all" if len(where) == len(releases) else ", ".join(where), *more]
        area = name.partition(".")[0]
        areas.setdefault(AREAS.get(area, area), []).append(cells)
    head = ["hook, and what it is on", "verl", "required", "why", "until"]
    return "\n\n".join(f"## {area}\n{markdown(head, rows)}" for area, rows in areas.items())


def releases() -> str:
    """Return the table of releases and their shims."""
    rows = []
    for release in compat.RELEASES:
        chosen = compat.select(compat.InstalledVerl(release, ""))
        rows.append([release, chosen.name, str(len(chosen.hooks)), f"`compat/constraints/verl-{release}.txt`"])
    return markdown(["verl", "shim", "hooks", "a set of versions it runs with"], rows)


def settings() -> str:
    """Return the table of the variables that the overlay acts on."""
    rows = [[f"`{v.name}`", v.allowed, v.help] for v in VARIABLES.values()]
    return markdown(["variable", "allowed", "what it does"], rows)


def stack() -> str:
    """Return the tables of the other components' variables."""
    own = {variable.name for variable in VARIABLES.values()}
    components: dict[str, list[list[str]]] = {}
    for v in (variable for variable in STACK.values() if variable.name not in own):
        since = f" Since {v.since}." if v.since else ""
        components.setdefault(v.component, []).append([f"`{v.name}`", v.allowed, v.help + since])
    head = ["variable", "allowed", "what it does"]
    return "\n\n".join(f"### {component}\n{markdown(head, rows)}" for component, rows in components.items())


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return command -> its parser, and of a command with actions (``dispatch check``) one for each action."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in actions(cli.parser(cli.NAMES)).items():
        found |= {name: parser, **{f"{name} {action}": each for action, each in actions(parser).items()}}
    return found


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the commands, or actions, that a parser has below it -> their parsers."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices[0]) if choices else {}


def commands() -> str:
    """Return what ``--help`` of each command prints on a terminal of 80 columns."""
    os.environ["COLUMNS"] = "80"
    texts = {f"verl-fl {name}": parser.format_help().rstrip() for name, parser in parsers().items()}
    texts = {"verl-fl": cli.parser(()).format_help().rstrip(), **texts}
    return "\n\n".join(f"## {name}\n```text\n{text}\n```" for name, text in texts.items())


def training() -> str:
    """Return the command of the recipe of GRPO with vLLM, several overrides a line."""
    exports, _, run = recipe.command().partition("\n")
    module, *overrides = run.split(" \\\n    ")
    lines = textwrap.wrap(" ".join(overrides), 110, break_on_hyphens=False, break_long_words=False)
    data = "python examples/arithmetic.py out/arithmetic  # a tiny model and its data; or change the paths below"
    return "\n".join(["```bash", data, exports, " \\\n    ".join([module, *lines]), "```"])


def chips() -> str:
    """Return the table of chips: what each is called, and what trains on it."""
    rows = []
    for chip in (*sorted(CHIPS.values(), key=lambda chip: chip.vendor), CPU):
        name = f"{chip.vendor} (`VERL_FL_DEVICE=cpu`)" if chip is CPU else chip.vendor
        own = chip.backend or "none: FlagCX only"
        flagcx = f"`USE_{MAKE[chip.vendor]}=1`" if chip.vendor in MAKE else "-"
        rows.append([name, chip.device, own, flagcx, f"`{chip.visible_devices}`", *platform(chip)])
    head = ["chip", "torch device", "collectives", "FlagCX", "visible devices", "verl 0.9", "verl 0.7, 0.8"]
    return markdown(head, rows)


def platform(chip: Chip) -> tuple[str, str]:
    """Say what serves as verl's platform for a chip: on 0.9, and on 0.7 and 0.8, which have none."""
    if chip is CPU:
        return "the overlay's platform", "the overlay's helpers"
    if chip.vendor in KNOWN_TO_VERL:
        return "verl's own platform", "verl's own helpers"
    if chip.device == "cuda":
        return f"verl's platform for {'rocm' if chip.on_rocm else 'cuda'}, under the vendor's name", "as cuda"
    return "the overlay's platform", "under torchrun; not with Ray or the legacy workers"


PARTS = {
    README: {"releases": releases, "training command": training},
    DOCS / "index.md": {"releases": releases},
    DOCS / "settings.md": {"settings": settings, "stack": stack},
    DOCS / "commands.md": {"commands": commands},
    DOCS / "hooks.md": {"hooks": lambda: hooks(by_release())},
    DOCS / "chips" / "others.md": {"chips": chips},
}
"""File -> its generated parts."""


def main() -> int:
    """Write outdated parts, or with --check only tell whether there are any; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    options = parser.parse_args()
    changed = {}
    for file, parts in PARTS.items():
        text = made = file.read_text(encoding="utf-8")
        for name, make in parts.items():
            made = replaced(made, name, "tools/pages.py", make())
        if made != text:
            changed[file] = made
    if options.check:
        return int(bool(changed))
    for file, made in changed.items():
        file.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
