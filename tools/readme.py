"""Write the tables of the two READMEs that are made from the code: ``python tools/readme.py [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping

from tables import README, ROOT, markdown, replaced

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the tables are this checkout's, also where another overlay is installed

from verl_fl_overlay import compat
from verl_fl_overlay.devices.chips import CHIPS, CPU, KNOWN_TO_VERL, Chip
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.settings import VARIABLES


def by_release() -> dict[str, tuple[Hook, ...]]:
    """Return release -> its hooks."""
    return {release: compat.select(compat.InstalledVerl(release, "")).hooks for release in compat.RELEASES}


def hooks(releases: Mapping[str, Iterable[Hook]]) -> str:
    """Return the table of hooks: the texts of each hook, and the releases that have it.

    A hook has one row, or several if it differs between releases, for example in its target.
    """
    having: dict[tuple[str, ...], list[str]] = {}
    for release, chosen in releases.items():
        for hook in chosen:
            target = f"[`{hook.module.removeprefix('verl.')}:{hook.attribute}`]({hook.upstream})"
            said = (f"`{hook.name}`", target, "yes" if hook.required else "no", hook.why, hook.until)
            having.setdefault(said, []).append(release)
    names = list(dict.fromkeys(name for name, *_ in having))
    rows = [
        [name, target, "all" if len(where) == len(releases) else ", ".join(where), *more]
        for (name, target, *more), where in sorted(having.items(), key=lambda row: names.index(row[0][0]))
    ]
    return markdown(["hook", "on", "verl", "required", "why", "until"], rows)


def releases() -> str:
    """Return the table of releases and their shims."""
    rows = []
    for release in compat.RELEASES:
        chosen = compat.select(compat.InstalledVerl(release, ""))
        file = f"compat/constraints/verl-{release}.txt"
        rows.append([release, chosen.name, str(len(chosen.hooks)), f"[{file}]({file})"])
    return markdown(["verl", "shim", "hooks", "a set of versions it runs with"], rows)


def settings() -> str:
    """Return the table of variables."""
    rows = [[f"`{v.name}`", v.allowed, v.help] for v in VARIABLES.values()]
    return markdown(["variable", "allowed", "what it does"], rows)


def chips() -> str:
    """Return the table of chips: what each is called, and what trains on it."""
    rows = []
    for chip in (*sorted(CHIPS.values(), key=lambda chip: chip.vendor), CPU):
        name = f"{chip.vendor} (`VERL_FL_DEVICE=cpu`)" if chip is CPU else chip.vendor
        own = chip.backend or "none: FlagCX only"
        rows.append([name, chip.device, own, f"`{chip.visible_devices}`", *platform(chip)])
    return markdown(["chip", "torch device", "collectives", "visible devices", "verl 0.9", "verl 0.7, 0.8"], rows)


def platform(chip: Chip) -> tuple[str, str]:
    """Say what serves as verl's platform for a chip: on 0.9, and on 0.7 and 0.8, which have none."""
    if chip is CPU:
        return "the overlay's platform", "the overlay's helpers"
    if chip.vendor in KNOWN_TO_VERL:
        return "verl's own platform", "verl's own helpers"
    if chip.device == "cuda":
        return f"verl's platform for {'rocm' if chip.on_rocm else 'cuda'}, under the vendor's name", "as cuda"
    return "the overlay's platform", "under torchrun; not with Ray or the legacy workers"


TABLES = {
    README: {"releases": releases, "settings": settings, "chips": chips},
    ROOT / "compat" / "README.md": {"hooks": lambda: hooks(by_release())},
}


def main() -> int:
    """Write outdated tables, or with --check only tell whether there are any; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    options = parser.parse_args()
    changed = {}
    for file, tables in TABLES.items():
        text = made = file.read_text(encoding="utf-8")
        for name, make in tables.items():
            made = replaced(made, name, "tools/readme.py", make())
        if made != text:
            changed[file] = made
    if options.check:
        return int(bool(changed))
    for file, made in changed.items():
        file.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
