"""All that ``compat/trial.py`` uses of verl is listed in its RELIES_ON, so that it is pinned and checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_fl_overlay.compat import trial

ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
"""The class of what the trial calls ``engine``; EngineRegistry.new constructs it."""


def used(program: ast.Module) -> Iterator[str]:
    """Yield ``module:attribute`` of what is imported from verl, read from it, or passed to its classes by keyword."""
    bound = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(program)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "verl"
        for alias in node.names
    }
    plain = {name: f"{module}:{attribute}" for name, (module, attribute) in bound.items()}
    read = {**{name: f"{target}." for name, target in plain.items()}, "engine": f"{ENGINE}."}
    read["tensordict_utils"] = "verl.utils.tensordict_utils:"  # a module, and not a name in one
    owners = {node.value.id for node in ast.walk(program) if of_a_name(node)}
    yield from (target for name, target in plain.items() if name not in owners)
    node: Any
    for node in ast.walk(program):
        if of_a_name(node) and node.value.id in read:
            yield read[node.value.id] + node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Config"):
            yield from (f"{plain[node.func.id]}.{keyword.arg}" for keyword in node.keywords)


def of_a_name(node: Any) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def test_all_that_is_used_of_verl_is_listed_and_nothing_else() -> None:
    program = ast.parse(Path(trial.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(program) if isinstance(node, ast.Import)]
    assert not [alias.name for node in imports for alias in node.names if alias.name.startswith("verl.")]
    found = {*used(program), f"{ENGINE}.__init__"}
    listed = set(trial.RELIES_ON)
    owners = {target.rpartition(".")[0] for target in listed}  # a class is listed with what is used of it
    assert found - owners == listed


def test_what_is_used_anew_is_seen() -> None:
    program = ast.parse(
        "from verl.a import f, Some\nfrom verl.b import SomeConfig\n"
        "def run(engine):\n    engine.new_thing()\n    Some.member\n    SomeConfig(field=f)"
    )
    assert set(used(program)) == {
        *("verl.a:f", "verl.b:SomeConfig", "verl.b:SomeConfig.field", "verl.a:Some.member", f"{ENGINE}.new_thing"),
    }


def test_the_overlay_is_not_imported() -> None:
    """It runs by path in a process that may be without the overlay, and compat is below the report."""
    program = ast.parse(Path(trial.__file__).read_text(encoding="utf-8"))
    imported = [ast.unparse(n) for n in ast.walk(program) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [line for line in imported if "verl_fl_overlay" in line]
