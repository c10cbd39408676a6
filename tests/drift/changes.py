"""What upstream does to its functions: every kind of change, made to the real text of a real file.

A change takes the text of a file and the qualified name of a function in it, and returns the new text, or None where
it makes no sense (a parameter cannot be dropped from a function without any).
"""

from __future__ import annotations

import ast
import copy
import functools
import textwrap
from collections.abc import Callable

Function = ast.FunctionDef | ast.AsyncFunctionDef
Change = Callable[[str, str], "str | None"]

MOVED_MODULE = "verl.moved"


@functools.lru_cache(maxsize=32)
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def locate(text: str, name: str) -> Function:
    node: ast.AST = parsed(text)
    for part in name.split("."):
        node = [n for n in ast.walk(node) if isinstance(n, ast.ClassDef | Function) and n.name == part][-1]
    assert isinstance(node, Function)
    return node


def locate_class(text: str, name: str) -> ast.ClassDef | None:
    top = name.partition(".")[0]
    return next((n for n in parsed(text).body if isinstance(n, ast.ClassDef) and n.name == top), None)


def first_line(node: Function | ast.ClassDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def cut(text: str, name: str) -> tuple[str, str]:
    """Take the function out; a class that it leaves empty gets a pass.  Return the rest and the function, dedented."""
    node = locate(text, name)
    lines = text.splitlines()
    taken = textwrap.dedent("\n".join(lines[first_line(node) - 1 : node.end_lineno])) + "\n"
    gap = [" " * node.col_offset + "pass"]
    return "\n".join([*lines[: first_line(node) - 1], *gap, *lines[node.end_lineno :]]) + "\n", taken


def with_header(text: str, name: str, edit: Callable[[Function], bool]) -> str | None:
    """Write the ``def`` line and the decorators anew after ``edit`` changed the node; None if it returns False."""
    node = copy.deepcopy(locate(text, name))
    if not edit(node):
        return None
    lines = text.splitlines()
    body_line = node.body[0].lineno
    bare = copy.copy(node)
    bare.body = [ast.Pass()]
    header = ast.unparse(ast.fix_missing_locations(bare)).splitlines()[:-1]
    header = [" " * node.col_offset + line for line in header]
    return "\n".join([*lines[: first_line(locate(text, name)) - 1], *header, *lines[body_line - 1 :]]) + "\n"


def own_parameters(node: Function) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args]


def rename(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        node.name += "_renamed"
        return True

    return with_header(text, name, edit)


def delete(text: str, name: str) -> str | None:
    return cut(text, name)[0]


def add_parameter(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        node.args.kwonlyargs.append(ast.arg("added"))
        node.args.kw_defaults.append(None)
        return True

    return with_header(text, name, edit)


def rename_parameter(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        if not own_parameters(node):
            return False
        own_parameters(node)[-1].arg += "_renamed"
        return True

    return with_header(text, name, edit)


def drop_parameter(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        if not node.args.args:
            return False
        node.args.args.pop()
        node.args.defaults = node.args.defaults[-len(node.args.args) :] if node.args.args else []
        return True

    return with_header(text, name, edit)


def make_keyword_only(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        if not node.args.args or node.args.vararg or node.args.kwonlyargs:
            return False
        node.args.kwonlyargs = [node.args.args.pop()]
        node.args.kw_defaults = [node.args.defaults.pop()] if node.args.defaults else [None]
        return True

    return with_header(text, name, edit)


def change_kind(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        decorators = [ast.unparse(d) for d in node.decorator_list]
        if "classmethod" in decorators:
            node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != "classmethod"]
        else:
            node.decorator_list.insert(0, ast.Name("staticmethod" if "." in name else "classmethod"))
        return True

    return with_header(text, name, edit)


def change_body(text: str, name: str) -> str | None:
    node = locate(text, name)
    lines = text.splitlines()
    end = node.body[0].lineno - 1
    added = " " * node.body[0].col_offset + "_something_new = 1"
    return "\n".join([*lines[:end], added, *lines[end:]]) + "\n"


def split(text: str, name: str) -> str | None:
    """Move the whole body into a helper beside the function, which calls it."""
    node = locate(text, name)
    lines = text.splitlines()
    indent, inner = " " * node.col_offset, " " * node.body[0].col_offset
    body = lines[node.body[0].lineno - 1 : node.end_lineno]
    call = f"{inner}return _{node.name}_inner()"
    helper = f"{indent}def _{node.name}_inner():"
    return "\n".join([*lines[: node.body[0].lineno - 1], call, "", helper, *body, *lines[node.end_lineno :]]) + "\n"


def decorate(decorator: str, definition: str = "") -> Change:
    def change(text: str, name: str) -> str | None:
        def edit(node: Function) -> bool:
            node.decorator_list.append(ast.parse(decorator, mode="eval").body)  # innermost: under @classmethod
            return True

        changed = with_header(text, name, edit)
        if changed is None:
            return None
        outermost = name.partition(".")[0]
        top = next(n for n in ast.parse(changed).body if getattr(n, "name", "") == outermost)
        assert isinstance(top, ast.ClassDef | Function)
        lines = changed.splitlines()
        at = first_line(top) - 1
        return "\n".join([*lines[:at], *definition.splitlines(), *lines[at:]]) + "\n"

    return change


OPAQUE = """
def retried(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner
"""

KEEPING = """
import functools
def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner
def registered(name):
    def register(function):
        return function
    return register
"""


def pull_up(text: str, name: str) -> str | None:
    """Move a method into a new base class."""
    owner, dot, _ = name.rpartition(".")
    if not dot:
        return None
    rest, method = cut(text, name)
    tree = ast.parse(rest)
    top = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    lines = rest.splitlines()
    bases = ["PulledUp", *map(ast.unparse, top.bases), *map(ast.unparse, top.keywords)]
    opening = top.lineno - 1
    until = top.body[0].lineno - 1
    comments = lines[opening + 1 : until] if lines[opening].rstrip().endswith(":") else []
    base = ["class PulledUp:", textwrap.indent(method, "    ")]
    at = first_line(top) - 1
    header = [*lines[at:opening], f"class {owner}({', '.join(bases)}):", *comments]
    return "\n".join([*lines[:at], *base, *header, *lines[until:]]) + "\n"


def comments(text: str, name: str) -> str | None:
    node = locate(text, name)
    lines = text.splitlines()
    at = node.body[-1].lineno - 1
    indent = " " * node.body[-1].col_offset
    return "\n".join([*lines[:at], "", f"{indent}# something to know", "", *lines[at:]]) + "\n"


def docstring(text: str, name: str) -> str | None:
    node = locate(text, name)
    lines = text.splitlines()
    start = node.body[0].lineno - 1
    had = ast.get_docstring(node) is not None
    rest = lines[node.body[0].end_lineno :] if had else lines[start:]
    new = " " * node.body[0].col_offset + '"""Say something else,\n\n    on several lines."""'
    return "\n".join([*lines[:start], new, *rest]) + "\n"


def formatting(text: str, name: str) -> str | None:
    """Print the whole function anew from its tree, in the printer's own layout and quotes, its body further in."""
    node = locate(text, name)
    lines = text.splitlines()
    heads = len(node.decorator_list) + 1
    printed = "\n".join(
        " " * (node.col_offset + 3 * (number >= heads)) + line
        for number, line in enumerate(ast.unparse(node).splitlines())
    )
    return "\n".join([*lines[: first_line(node) - 1], printed, *lines[node.end_lineno :]]) + "\n"


def annotations(text: str, name: str) -> str | None:
    def edit(node: Function) -> bool:
        node.returns = ast.Constant("Something") if node.returns is None else None
        for argument in own_parameters(node):
            argument.annotation = ast.Constant("Something") if argument.annotation is None else None
        return True

    return with_header(text, name, edit)


BREAKING: dict[str, tuple[Change, str]] = {
    "rename": (rename, "MOVED"),
    "delete": (delete, "MISSING"),
    "add a parameter": (add_parameter, "SIGNATURE"),
    "rename a parameter": (rename_parameter, "SIGNATURE"),
    "drop a parameter": (drop_parameter, "SIGNATURE"),
    "make a parameter keyword-only": (make_keyword_only, "SIGNATURE"),
    "change the kind": (change_kind, "SIGNATURE"),
}
"""Change -> how check calls it; the hook cannot be installed."""

WORTH_A_LOOK: dict[str, tuple[Change, str]] = {
    "change the body": (change_body, "BODY changed"),
    "split": (split, "BODY changed"),
    "wrap": (decorate("retried", OPAQUE), "BODY changed"),
    "pull up into a base class": (pull_up, "MOVED"),
}
"""Change -> how check calls it; the hook is installed."""

HARMLESS: dict[str, Change] = {
    "comments": comments,
    "docstring": docstring,
    "formatting": formatting,
    "annotations": annotations,
    "a decorator that wraps": decorate("logged", KEEPING),
    "a decorator that registers": decorate("registered('x')", KEEPING),
    "no_grad": decorate("torch.no_grad()", "import torch"),
}
"""Changes that nobody has to look at."""
