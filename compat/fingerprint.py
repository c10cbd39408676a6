"""Fingerprints of verl's functions, read from source by ``ast``: no import of verl, no torch.

A fingerprint has two levels.  The contract (kind and parameters) is what a hook relies on to be callable at all; the
body's digest tells that a function does something else now, and asks for a look.  The digest is taken from the syntax
tree without docstrings, annotations and positions, so comments and formatting do not change it, and only from what is
present in a node, so every Python version gives the same.
"""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Source(Protocol):
    """Something that holds verl's files: a folder or a wheel."""

    def read(self, path: str) -> str | None:
        """Return the text of ``path`` (such as ``verl/protocol.py``), None if there is no such file."""


class Folder:
    """A folder in which ``verl/`` lies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, path: str) -> str | None:
        """Return the file's text, None if it is not there."""
        file = self._path / path
        return file.read_text(encoding="utf-8") if file.is_file() else None


class Wheel:
    """A wheel, read without unpacking it."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist())

    def read(self, path: str) -> str | None:
        """Return the member's text, None if it is not there."""
        return self._zip.read(path).decode("utf-8") if path in self._names else None


@dataclass(frozen=True)
class Fingerprint:
    """What a function is: ``kind`` is function, async function, classmethod, staticmethod, property or missing."""

    kind: str
    parameters: tuple[str, ...] = ()
    body: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as it stands in a pins file."""
        return {"kind": self.kind, "parameters": list(self.parameters), "body": self.body}


MISSING = Fingerprint("missing")


def fingerprint(source: Source, module: str, attribute: str) -> Fingerprint:
    """Fingerprint ``attribute`` (such as ``Class.method``) of ``module``; ``MISSING`` if it is not defined there.

    A name that the module imports is followed to the module that defines it, inside verl.

    Raises:
        SyntaxError: the file cannot be parsed; names it.
    """
    tree = _parse(source, module)
    if tree is None:
        return MISSING
    node: ast.AST = tree
    for position, name in enumerate(attribute.split(".")):
        found = _definition(node, name)
        if found is None and position == 0:
            origin = _imported_from(tree, _package(source, module), name)
            if origin is not None:
                rest = attribute.split(".")[1:]
                return fingerprint(source, origin[0], ".".join([origin[1], *rest]))
        if found is None:
            return MISSING
        node = found
    return _of_function(node) if isinstance(node, FunctionNode) else MISSING


def _parse(source: Source, module: str) -> ast.Module | None:
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        text = source.read(candidate)
        if text is not None:
            return ast.parse(text, filename=candidate)
    return None


def _definition(node: ast.AST, name: str) -> ast.AST | None:
    """Return the last definition of ``name`` in the node's body, also inside its ifs and trys."""
    found = None
    for child in _statements(node):
        if isinstance(child, FunctionNode | ast.ClassDef) and child.name == name:
            found = child
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, []):
            yield child
            if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                yield from _statements(child)


def _package(source: Source, module: str) -> str:
    """Return what relative imports in ``module`` start from: itself if it is a package, else its parent."""
    is_module = source.read(f"{module.replace('.', '/')}.py") is not None
    return module.rpartition(".")[0] if is_module else module


def _imported_from(tree: ast.Module, package: str, name: str) -> tuple[str, str] | None:
    for child in _statements(tree):
        if not isinstance(child, ast.ImportFrom):
            continue
        for alias in child.names:
            if (alias.asname or alias.name) == name:
                return _absolute(package, child), alias.name
    return None


def _absolute(package: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _of_function(node: FunctionNode) -> Fingerprint:
    decorators = [ast.unparse(d) for d in node.decorator_list]
    kind = "async function" if isinstance(node, ast.AsyncFunctionDef) else "function"
    for special in ("classmethod", "staticmethod", "property"):
        if special in decorators:
            kind = special
    return Fingerprint(kind, tuple(_parameters(node.args)), _digest(node.body))


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for index, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        yield argument.arg + (f"={ast.unparse(default)}" if default is not None else "")
        if arguments.posonlyargs and index == len(arguments.posonlyargs) - 1:
            yield "/"
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, kw_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg + (f"={ast.unparse(kw_default)}" if kw_default is not None else "")
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}"


def _digest(body: list[ast.stmt]) -> str:
    digest = hashlib.sha256()
    for token in _structure(_without_docstring(body)):
        digest.update(token.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return body[1:] if isinstance(body[0].value.value, str) else body
    return body


_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "type_ignores", "decorator_list"}


def _structure(value: Any) -> Iterator[str]:
    """Yield the tree as a flat sequence of names and values, the same on every Python version."""
    if isinstance(value, ast.AST):
        yield f"<{type(value).__name__}"
        for name, child in ast.iter_fields(value):
            if name in _LEFT_OUT or child is None or child == []:
                continue
            yield name
            if name == "body" and isinstance(value, FunctionNode | ast.ClassDef):
                child = _without_docstring(child)
            yield from _structure(child)
        yield ">"
    elif isinstance(value, list):
        yield "["
        for item in value:
            yield from _structure(item)
        yield "]"
    else:
        yield repr(value)
