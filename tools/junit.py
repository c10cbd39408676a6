"""The one reader of pytest's results, which are JUnit files (``--junitxml``)."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One test: its name with its parameters, its folder below ``tests/`` and how it ended.

    ``outcome`` is passed, failed (an error in a fixture is one too) or skipped, ``why`` the reason of a skip.
    """

    name: str
    folder: str
    outcome: str
    why: str = ""


def cases(file: Path) -> Iterator[Case]:
    """Yield every test of a result file."""
    for case in ElementTree.parse(file).iter("testcase"):
        name, skipped = case.get("name", ""), case.find("skipped")
        # A file that cannot be collected has no class; its name is that of its module.
        module = (case.get("classname") or name).split(".")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "passed" if skipped is None else "skipped"
        why = "" if skipped is None else skipped.get("message", "")
        if skipped is not None and why == "collection skipped":  # a whole file; its text is (file, line, reason)
            why = str(ast.literal_eval(skipped.text or "")[2]).removeprefix("Skipped: ")
        yield Case(name, module[1] if len(module) > 1 else "?", outcome, why)
