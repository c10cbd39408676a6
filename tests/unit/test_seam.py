"""The seam: outside compat nothing knows verl, and all that compat reads of verl and transformers is pinned."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import verl_fl_overlay
from verl_fl_overlay import compat
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import PACKAGES, top_level
from verl_fl_overlay.events import Engine

PACKAGE = Path(verl_fl_overlay.__file__).parent
COMPAT = Path(compat.__file__).parent
OUTSIDE = [file for file in sorted(PACKAGE.rglob("*.py")) if "compat" not in file.relative_to(PACKAGE).parts]
HOOK_FILES = [file for file in sorted(COMPAT.glob("*.py")) if file.name not in ("pins.py", "trial.py", "__init__.py")]

OF_VERLS_OBJECTS = {"instance", "engine", "registry", "wrapped", "worker", "owner"}
"""What hook files call the objects that they get from verl."""

OF_OTHERS_OBJECTS = {"model", "config", "model_config"}
"""What hook files call the objects that they get from transformers; what they read of these by its name is private."""

ASKED_FOR = {"_supports_flash_attn_2": "a class that was written for transformers 4 may have it instead"}
"""What is read of such an object and is pinned nowhere, and why: it is not in transformers itself."""

READERS = ("_attribute", "getattr")
"""Functions that read an attribute by its name."""


def hooks() -> list:
    return [h for r in compat.RELEASES for h in compat.select(compat.InstalledVerl(r, "")).hooks]


PINNED = {target for release in compat.RELEASES for target in pins.load(release)}
LISTED = {target for hook in hooks() for target in (hook.target, *hook.relies_on)}


OF_AN_ENGINE = {f"engine.{field.name}" for field in fields(Engine)}
"""What a feature may ask an engine: what the event of that name holds."""

OTHERS_TOO = {"get_device_name"}
"""What torch's device modules have as well."""

OF_VERL_ALONE = {leaf for t in PINNED if "_" in (leaf := t.split(":")[1].split(".")[-1]).strip("_")} - OTHERS_TOO
"""Names of verl's functions and attributes that are no plain words."""


def docstrings(tree: ast.AST) -> set[ast.AST]:
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def verls_names(tree: ast.AST) -> Iterator[str]:
    """Yield what in a file is a name of verl's: an import, a module's path, a class that compat hooks."""
    told = docstrings(tree)
    modules = {target.partition(":")[0] for target in PINNED}
    classes = {target.partition(":")[2].split(".")[0] for target in PINNED if "." in target.partition(":")[2]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "verl")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verl":
            yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
            words = set(re.findall(r"[\w.]+", node.value))
            yield from words & (modules | classes)
            yield from (word for word in words if re.fullmatch(r"verl\.[a-z_]+(\.\w+)*", word))
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            yield from {name} & classes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "engine":
            yield from {f"engine.{node.attr}"} - OF_AN_ENGINE
        elif isinstance(node, ast.Attribute | ast.Constant):
            yield from {node.attr if isinstance(node, ast.Attribute) else node.value} & OF_VERL_ALONE


@pytest.mark.parametrize("file", OUTSIDE, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_name_of_verls_outside_compat(file):
    assert sorted(set(verls_names(ast.parse(file.read_text(encoding="utf-8"))))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import verl.protocol",
        "from verl.utils import device",
        "module = 'verl.workers.engine.base'",
        "kind = 'FSDPEngine'",
        "isinstance(x, FSDPEngine)",
        "base.EngineRegistry",
        "engine.module",
        "getattr(engine, 'param_dtype', None)",
        "other._autocast_dtype",
        "name = 'get_nccl_backend'",
    ],
)
def test_the_search_finds_a_name_of_verls(text):
    assert list(verls_names(ast.parse(text)))


def root(node: ast.expr) -> str:
    """Return the variable that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def modules_in(tree: ast.Module) -> dict[str, str]:
    """Return how a hook file writes a module that it imports by name, or keeps in a variable -> the module's name."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            (given,) = node.args
            name = given.value if isinstance(given, ast.Constant) else constants.get(ast.unparse(given))
            if name is not None:
                found[ast.unparse(node)] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (name := found.get(ast.unparse(node.value))):
            found[ast.unparse(node.targets[0])] = name
    return found


def read_of_pinned(tree: ast.Module) -> Iterator[str]:
    """Yield what a hook file imports from pinned packages (``module:name``) and reads of their objects (``.name``)."""
    modules = modules_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and top_level(node.module or "") in PACKAGES:
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (f"{alias.name}:" for alias in node.names if top_level(alias.name) in PACKAGES)
        elif isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))):
            yield f"{module}:{node.attr}"
        elif isinstance(node, ast.Attribute) and root(node) in OF_VERLS_OBJECTS:
            yield f".{node.attr}"
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_attribute", "getattr")
        ):
            whose, name = ast.unparse(node.args[0]), node.args[1]
            if not isinstance(name, ast.Constant):
                continue
            private = name.value.startswith("_") and name.value not in ASKED_FOR
            if whose in OF_VERLS_OBJECTS or (whose in OF_OTHERS_OBJECTS and private):
                yield f".{name.value}"


@pytest.mark.parametrize("file", HOOK_FILES, ids=lambda file: file.name)
def test_what_a_hook_reads_of_a_pinned_package_is_pinned(file):
    for read in read_of_pinned(ast.parse(file.read_text(encoding="utf-8"))):
        if read.startswith("."):
            known = any(target.endswith((read, f":{read[1:]}")) for target in LISTED)
        else:
            module, _, name = read.partition(":")
            whole_module = f"{module}.{name}"  # from verl.utils import torch_functional
            known = any(t == read or t.startswith((f"{read}.", f"{whole_module}:")) for t in LISTED)
        assert known, f"{file.name} reads {read}, which no hook has in relies_on"


def test_the_search_finds_what_is_read():
    text = "from verl.a import b\ndef w(instance):\n _attribute(instance, 'c')\n getattr(engine, 'd')\n instance.e.f"
    assert set(read_of_pinned(ast.parse(text))) == {"verl.a:b", ".c", ".d", ".e", ".f"}
    text = """
M = "transformers.a"
from transformers import B
importlib.import_module(M).c
own = importlib.import_module("transformers.d")
own.e
getattr(model, "_f", None)
getattr(model, "public", None)
"""
    read = {"transformers:B", "transformers.a:c", "transformers.d:e", "._f"}
    assert set(read_of_pinned(ast.parse(text))) == read
