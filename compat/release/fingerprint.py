"""Fingerprints of a package's functions, read from source by ``ast``: nothing is imported, neither verl nor torch.

A fingerprint has two levels.  The contract (kind and parameters) is what a hook needs to be called at all.  The digest
of the body shows that a function was changed, and that somebody has to read the change.  It is made from the syntax
tree without docstrings, annotations and positions, so that comments and formatting do not change it.  Empty fields of
a node are left out, so that every Python version gives the same digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from verl_fl_overlay.compat.pins import FUNCTIONS, INSTANCE_ATTRIBUTE, MISSING, Fingerprint, top_level
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.errors import OverlayError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_HOPS = 8
"""How many imports, aliases and base classes are followed; a longer chain must be a circle."""


@dataclass(frozen=True)
class _Found:
    """A definition and its place: one node, all statements that assign an attribute, or none if outside the package."""

    module: str
    name: str
    nodes: tuple[ast.AST, ...]


def fingerprint(tree: Tree, module: str, attribute: str) -> Fingerprint:
    """Fingerprint ``attribute`` (such as ``Class.method``) of ``module``; ``MISSING`` if it is not there.

    A name that the module imports, or a class inherits, is followed to its definition in the same package.  A stub that
    only raises NotImplementedError counts as missing: a class inherits it after its own method was moved away.

    Raises:
        OverlayError: a file cannot be parsed; names it.
    """
    found = _find(tree, module, attribute.split("."), _HOPS)
    return MISSING if found is None or any(map(_is_stub, found.nodes)) else _of(tree, found)


def elsewhere(tree: Tree, pin: Fingerprint) -> list[str]:
    """Return ``module:name`` of every function in ``tree`` with the body of ``pin``.

    A body of two names or fewer (``raise NotImplementedError``) is common, so there the function's name has to be the
    same too.  Attributes and classes have no body to be found by.
    """
    if pin.kind not in FUNCTIONS:
        return []
    own_name = pin.at.rpartition(":")[2].rpartition(".")[2]
    places = []
    for path in tree.files():
        text = tree.read(path) or ""
        if not all(word in text for word in pin.words):
            continue
        try:
            parsed = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, node in _functions(parsed):
            common = len(pin.words) <= 2 and node.name != own_name
            if not common and _digest(node.body) == pin.body:
                places.append(f"{module}:{name}")
    return places


_WORDS = 6
"""How many names of a body are kept to find it again; three are enough to distinguish it from common bodies."""


def _words(body: list[ast.stmt]) -> tuple[str, ...]:
    """Return the longest names and one-word strings in a body: a file without one of them cannot hold it."""
    values = {
        value
        for statement in _without_docstring(body)
        for node in ast.walk(statement)
        for name in ("id", "attr", "value")
        if isinstance(value := getattr(node, name, None), str) and value.isidentifier()
    }
    return tuple(sorted(values - {"self", "cls"}, key=lambda word: (-len(word), word))[:_WORDS])


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, FunctionNode]]:
    for child in _statements(node):
        if isinstance(child, FunctionNode):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


@functools.lru_cache(maxsize=64)
def _parsed(path: str, text: str) -> ast.Module:
    try:
        return ast.parse(text, filename=path)
    except SyntaxError as error:
        raise OverlayError(f"{path}, line {error.lineno}: {error.msg}; a hooked file cannot be parsed") from error
    except ValueError as error:
        raise OverlayError(f"{path}: {error}; a hooked file cannot be parsed") from error


def _module(tree: Tree, module: str) -> tuple[str, ast.Module] | None:
    path = tree.source_of(module)
    return None if path is None else (path, _parsed(path, tree.read(path) or ""))


def _find(tree: Tree, module: str, names: list[str], hops: int) -> _Found | None:
    parsed = _module(tree, module)
    if parsed is None or not hops:
        return None
    path, node = parsed
    first, rest = names[0], names[1:]
    definition = _definition(node, first)
    if definition is None:
        origin = _imported_from(node, path, module, first)
        if origin is not None and top_level(origin[0]) == tree.package.name:
            return _find(tree, origin[0], [origin[1], *rest], hops - 1)
        if origin is not None:
            return None if rest else _Found(origin[0], origin[1], ())
        assigned = _assignments(node, first)
        if len(assigned) == 1 and isinstance(alias := getattr(assigned[0], "value", None), ast.Name):
            return _find(tree, module, [alias.id, *rest], hops - 1)
        if not assigned:
            return _in_star_imports(tree, node, path, module, names, hops)
        return None if rest else _Found(module, first, assigned)
    if not rest:
        return _Found(module, first, (definition,))
    return _member(tree, module, definition, first, rest[0], hops) if len(rest) == 1 else None


def _in_star_imports(
    tree: Tree, node: ast.Module, path: str, module: str, names: list[str], hops: int
) -> _Found | None:
    """Look the names up in the modules from which everything is imported (``from .engine import *``)."""
    for child in _statements(node):
        if isinstance(child, ast.ImportFrom) and child.names[0].name == "*" and not names[0].startswith("_"):
            found = _find(tree, _absolute(path, module, child), names, hops - 1)
            if found is not None:
                return found
    return None


def _member(tree: Tree, module: str, owner: ast.AST, prefix: str, name: str, hops: int) -> _Found | None:
    """Look ``name`` up in a class: its own definition, else an attribute that it assigns, else in its bases."""
    if not isinstance(owner, ast.ClassDef):
        return None
    definition = _definition(owner, name)
    if definition is not None:
        return _Found(module, f"{prefix}.{name}", (definition,))
    assigned = _assignments(owner, name)
    if len(assigned) == 1 and isinstance(alias := getattr(assigned[0], "value", None), ast.Name) and hops:
        aliased = _member(tree, module, owner, prefix, alias.id, hops - 1)
        if aliased is not None:
            return aliased
    if assigned:
        return _Found(module, f"{prefix}.{name}", assigned)
    for base in owner.bases:
        found = _find(tree, module, [*ast.unparse(base).split("."), name], hops - 1)
        if found is not None:
            return found
    return None


def _is_stub(node: ast.AST) -> bool:
    if not isinstance(node, FunctionNode):
        return False
    body = _without_docstring(node.body)
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])


def _definition(node: ast.AST, name: str) -> ast.AST | None:
    """Return the last definition of ``name`` in the node's body, also inside its ifs and trys; no property's setter."""
    found = None
    for child in _statements(node):
        if not isinstance(child, FunctionNode | ast.ClassDef) or child.name != name:
            continue
        if not {f"{name}.setter", f"{name}.deleter"} & {ast.unparse(decorator) for decorator in child.decorator_list}:
            found = child
    return found


def _assignments(node: ast.AST, name: str) -> tuple[ast.stmt, ...]:
    """Return what assigns ``name``: in the node's body, and as ``self.name`` in the methods of a class."""
    return tuple(_assigned(node).get(name, ()))


@functools.lru_cache(maxsize=256)
def _assigned(node: ast.AST) -> dict[str, dict[ast.stmt, None]]:
    """Return name -> the statements that assign it, in their order; a class is asked for many of its names."""
    found: dict[str, dict[ast.stmt, None]] = {}
    for child in _statements(node):
        if isinstance(child, ast.Assign | ast.AnnAssign):
            for target in _targets(child):
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, {})[child] = None
        elif isinstance(node, ast.ClassDef) and isinstance(child, FunctionNode):
            for inner in ast.walk(child):
                for target in _targets(inner):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        found.setdefault(target.attr, {})[inner] = None  # type: ignore[index]
    return found


def _targets(node: ast.AST) -> list[ast.expr]:
    """Return what a statement assigns, each of a tuple's members by itself."""
    given = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part for target in given for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for part in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, part, []):
            yield child
            if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                yield from _statements(child)


def _imported_from(tree: ast.Module, path: str, module: str, name: str) -> tuple[str, str] | None:
    for child in _statements(tree):
        if not isinstance(child, ast.ImportFrom):
            continue
        for alias in child.names:
            if (alias.asname or alias.name) == name:
                return _absolute(path, module, child), alias.name
    return None


def _absolute(path: str, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts if path.endswith("/__init__.py") else parts[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _of(tree: Tree, found: _Found) -> Fingerprint:
    at = f"{found.module}:{found.name}"
    if not found.nodes:
        return Fingerprint("import", at=at)
    node = found.nodes[-1]
    lines = (tree.read(_module(tree, found.module)[0]) or "").splitlines()  # type: ignore[index]
    if isinstance(node, FunctionNode):
        written = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
        opaque = [
            w for w, d in zip(written, node.decorator_list, strict=True) if not _transparent(tree, found.module, d)
        ]
        source = (*written, *_text(node, lines))
        return replace(_of_function(node), at=at, decorators=tuple(opaque), source=source)
    if isinstance(node, ast.ClassDef):
        return Fingerprint("class", tuple(_abstract(node)), at=at)
    text = [line for statement in found.nodes for line in _text(statement, lines)]
    values = [value for statement in found.nodes if (value := getattr(statement, "value", None)) is not None]
    on_instance = any(isinstance(t, ast.Attribute) for statement in found.nodes for t in _targets(statement))
    kind = INSTANCE_ATTRIBUTE if on_instance or not values else "attribute"
    return Fingerprint(kind, (), _digest(values), at, source=tuple(text))


def _of_function(node: FunctionNode) -> Fingerprint:
    decorators = [ast.unparse(d) for d in node.decorator_list]
    kind = "async function" if isinstance(node, ast.AsyncFunctionDef) else "function"
    for special in ("classmethod", "staticmethod", "property"):
        if special in decorators:
            kind = special
    return Fingerprint(kind, tuple(_parameters(node.args)), _digest(node.body), words=_words(node.body))


def _abstract(node: ast.ClassDef) -> list[str]:
    return sorted(
        child.name
        for child in _statements(node)
        if isinstance(child, FunctionNode)
        and any(ast.unparse(d).rpartition(".")[2] == "abstractmethod" for d in child.decorator_list)
    )


_TRANSPARENT = {
    *("classmethod", "staticmethod", "property", "abstractmethod", "override", "final", "wraps", "cache", "lru_cache"),
    *("no_grad", "enable_grad", "inference_mode"),
}
"""Decorators of Python and torch that are part of the kind, or that do not change parameters and result."""


def _transparent(tree: Tree, module: str, decorator: ast.expr) -> bool:
    """Tell whether a decorator keeps the function's parameters; one that cannot be inspected counts as not keeping."""
    name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
    if name.rpartition(".")[2] in _TRANSPARENT:
        return True
    found = _find(tree, module, name.split("."), _HOPS)
    return found is not None and any(_passes_on(node) for part in found.nodes for node in ast.walk(part))


def _passes_on(node: ast.AST) -> bool:
    """Tell whether a function in a decorator wraps by ``functools.wraps``, or returns its only argument."""
    if not isinstance(node, FunctionNode):
        return False
    if any(ast.unparse(d).startswith(("functools.wraps(", "wraps(")) for d in node.decorator_list):
        return True
    own = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
    last = node.body[-1]
    return (
        len(own) == 1 and isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == own[0]
    )


def _text(node: ast.AST, lines: list[str]) -> list[str]:
    """Return the node's lines, dedented, without decorators, docstrings, comment lines and blank lines."""
    first, last = node.lineno, node.end_lineno  # type: ignore[attr-defined]
    dropped: set[int] = set()
    literal: set[int] = set()
    for child in ast.walk(node):
        if isinstance(child, FunctionNode | ast.ClassDef) and _without_docstring(child.body) is not child.body:
            docstring = child.body[0]
            dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
        elif isinstance(child, ast.Constant | ast.JoinedStr):
            literal.update(range(child.lineno + 1, (child.end_lineno or child.lineno) + 1))
    kept = [
        lines[number - 1]
        for number in range(first, last + 1)
        if number not in dropped
        and (number in literal or (lines[number - 1].strip() and not lines[number - 1].lstrip().startswith("#")))
    ]
    return textwrap.dedent("\n".join(line.rstrip() for line in kept)).splitlines()


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


def _digest(body: list[Any]) -> str:
    digest = hashlib.sha256()
    for token in _structure(_without_docstring(body)):
        digest.update(token.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _without_docstring(body: list[Any]) -> list[Any]:
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return body[1:] if isinstance(body[0].value.value, str) else body
    return body


_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "type_ignores", "decorator_list"}


def _structure(value: Any) -> Iterator[str]:
    """Yield the tree as a flat sequence of names and values, the same on every Python version."""
    if isinstance(value, ast.AnnAssign):
        if value.value is None:
            return
        value = ast.Assign([value.target], value.value)
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
