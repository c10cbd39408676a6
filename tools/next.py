"""What a maintainer has to do for the newest verl:  python tools/next.py CHECK.json [RESULT.xml]

CHECK.json is the output of ``verl-fl check latest --json``, RESULT.xml the matrix row that was run on it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from junit import cases

from verl_fl_overlay import compat


def main(check: Path, result: Path | None) -> None:
    """Print the list of what is to be done."""
    found = json.loads(check.read_text(encoding="utf-8"))
    version = found["verl"]
    print(f"newest on the index: verl {version}.  {found['verdict']}")
    failed = failures(result)
    if version in compat.RELEASES and not failed:
        print("It is pinned and in the matrix: nothing to do.")
        return
    todo = [f"find out why {fault}" for fault in failed]
    compared = {f"hook {hook['name']}": [hook, *hook["relies_on"]] for hook in found["hooks"]}
    for what, changes in {**compared, "compat/trial.py": found["trial"]}.items():
        for change in changes:
            if change["status"] not in ("OK", "UNPINNED"):
                words = "mend" if change["breaks"] else "review"
                todo.append(f"{words} {what}: {change['status']} {change['target']} {change['detail']}".rstrip())
    if version not in compat.RELEASES:
        todo += [
            f"write compat/constraints/verl-{version}.txt from the environment of this session (pip freeze)",
            f"verl-fl pin {version} --write",
            "python tools/pages.py",
            f"nox -s \"compat(verl='{version}')\"",
        ]
    print("\n".join(f"{number}. {task}" for number, task in enumerate(todo, 1)))


def failures(result: Path | None) -> list[str]:
    """Say which tests of a JUnit file did not pass, or that it was not written."""
    if result is None:
        return []
    if not result.is_file():
        return ["the row of the matrix ended without a result"]
    return [f"{case.name} fails" for case in cases(result) if case.outcome == "failed"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
