"""The structure that no import shows: no circle of files, and no state of a module but what a process has one of."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import verl_fl_overlay
from verl_fl_overlay import compat
from verl_fl_overlay.settings.variables import FUSED

PACKAGE, COMPAT = Path(verl_fl_overlay.__file__).parent, Path(compat.__file__).parent


def module(file: Path) -> str:
    root, name = (COMPAT, "verl_fl_overlay.compat") if COMPAT in file.parents else (PACKAGE, "verl_fl_overlay")
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join([name, *(part for part in parts if part != "__init__")])


OWN = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] != "compat"]
FILES = {module(file): ast.parse(file.read_text(encoding="utf-8")) for file in (*OWN, *COMPAT.rglob("*.py"))}

OF_THE_PROCESS = {
    "activation._process": "the active overlay, and the lock that makes one of two activations wait",
    "phase.training": "verl nests engines and keeps several in one process; routing is switched for all of them",
    "events.failures": "what failed since the activation, in whatever part; an activation forgets it",
    "kernels.turns._mine": "a file lock is the process's: its own would keep it from entering a turn again",
    "flaggems.database._seats": "lock files that are held until the process ends",
}
"""All module-level state of the package, and why a process has one of it.

Beside these there are the events and questions in ``events``, whose subscribers are the started features', caches of
what cannot change while a process runs (functools.cache), and loggers.
"""

STATELESS = {"Event", "Question", "getLogger", "TypeVar", "ParamSpec", "namedtuple", "Version", "frozenset", "tuple"}


def test_a_kernel_kind_is_a_file_of_its_name():
    kernels = {name.rpartition(".")[2]: ast.unparse(tree) for name, tree in FILES.items() if ".kernels." in name}
    assert set(FUSED) <= kernels.keys()
    assert {name for name, text in kernels.items() if "def recognise(" in text} <= set(FUSED)


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """Yield the files of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found = f"{node.module}.{alias.name}"
                yield from {found if found in FILES else node.module} & FILES.keys() - {name}


def without_typing(tree: ast.Module) -> ast.Module:
    """Return the file without what only a type checker imports, which no process does."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(kept, [])


def test_no_circle_of_files():
    graph = {name: set(imports(name, without_typing(tree))) for name, tree in FILES.items()}
    assert len(graph) > 60
    assert sum(map(len, graph.values())) > 200
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def state(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield the names of what a file keeps: a mutable value under a name that is no constant's."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if not isinstance(target, ast.Name) or re.fullmatch(r"_?[A-Z][A-Za-z0-9_]*|__\w+__", target.id):
                continue
            made = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
            if made not in STATELESS and not isinstance(value, ast.Constant):
                yield f"{name.removeprefix('verl_fl_overlay.')}.{target.id}"


def test_modules_keep_no_state_but_what_a_process_has_one_of():
    assert {found for name, tree in FILES.items() for found in state(name, tree)} == OF_THE_PROCESS.keys()


def test_no_function_rebinds_a_name_of_its_module():
    rebinding = {name for name, tree in FILES.items() for node in ast.walk(tree) if isinstance(node, ast.Global)}
    assert rebinding == set()


def changed_constants(tree: ast.Module) -> Iterator[str]:
    """Yield module-level constants that code of the same file changes."""
    constants = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    constants |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    changing = {"append", "add", "update", "pop", "clear", "extend", "setdefault", "remove", "discard", "insert"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
            owner = node.func.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            owner = node.targets[0].value
        else:
            continue
        if isinstance(owner, ast.Name) and owner.id in constants:
            yield owner.id


def test_no_code_changes_a_constant():
    changed = {
        f"{n.removeprefix('verl_fl_overlay.')}.{c}" for n, tree in FILES.items() for c in changed_constants(tree)
    }
    assert changed <= OF_THE_PROCESS.keys()


@pytest.mark.parametrize("text", ["_found: dict = {}", "kept = Record()", "_turns = set()"])
def test_the_search_finds_state(text):
    assert list(state("a", ast.parse(text)))
