"""Write the tables of the two READMEs that are made from the code: ``python tools/readme.py [--check]``."""

from __future__ import annotations

import argparse
import sys

from tables import README, ROOT, markdown, replaced

sys.path.insert(0, str(ROOT))  # the tables are this checkout's, also where another overlay is installed

from verl_fl_overlay import compat
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.settings import VARIABLES


def by_release() -> dict[str, dict[str, Hook]]:
    """Return release -> name -> hook."""
    chosen = {r: compat.select(compat.InstalledVerl(r, "")).hooks for r in compat.RELEASES}
    return {release: {hook.name: hook for hook in hooks} for release, hooks in chosen.items()}


def hooks() -> str:
    """Return the table of hooks: one row a hook, and the releases that have it."""
    releases = by_release()
    every = {name: hook for hooks in releases.values() for name, hook in hooks.items()}
    rows = []
    for name, hook in every.items():
        having = [release for release, hooks in releases.items() if name in hooks]
        where = "all" if len(having) == len(releases) else ", ".join(having)
        required = "yes" if hook.required else "no"
        target = f"[`{hook.module.removeprefix('verl.')}:{hook.attribute}`]({hook.upstream})"
        rows.append([f"`{name}`", target, where, required, hook.why, hook.until])
    return markdown(["hook", "on", "verl", "required", "why", "until"], rows)


def releases() -> str:
    """Return the table of releases and their shims."""
    rows = []
    for release in compat.RELEASES:
        chosen = compat.select(compat.InstalledVerl(release, ""))
        file = f"compat/constraints/verl-{release}.txt"
        rows.append([release, chosen.shim, str(len(chosen.hooks)), f"[{file}]({file})"])
    return markdown(["verl", "shim", "hooks", "a set of versions it runs with"], rows)


def settings() -> str:
    """Return the table of variables."""
    rows = [[f"`{v.name}`", v.allowed, v.help] for v in VARIABLES.values()]
    return markdown(["variable", "allowed", "what it does"], rows)


TABLES = {README: {"releases": releases, "settings": settings}, ROOT / "compat" / "README.md": {"hooks": hooks}}


def main() -> int:
    """Write the tables that are not up to date, or only tell whether there are any; return the exit status."""
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
