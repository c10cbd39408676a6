"""Finds what a plugin for rollout would ignore or misunderstand in its configuration file."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay.dispatch.file import listed
from verl_fl_overlay.errors import nearest
from verl_fl_overlay.packages import folders
from verl_fl_overlay.settings.conflicts import token_faults, vendor_faults
from verl_fl_overlay.settings.plugins import CONFIG_FOLDER, VLLM, Plugin
from verl_fl_overlay.settings.stack import PREFER

WRONG_NAMES = {
    "_to_copy": "to_copy",
    "_softmax": "softmax",
    "rmsnorm": "rms_norm",
    "layernorm": "layer_norm",
    "flash_attention": "flash_attention_forward",
}
"""Names that documents give for FlagGems' functions -> the functions."""

NOTE = "note: "
"""The beginning of a finding that is not a fault."""


def check(content: dict[str, Any], plugin: Plugin = VLLM) -> list[str]:
    """Return everything in ``content`` that the plugin would ignore or misunderstand.

    What a newer or older version may know is only a note: a key, an operator that the installed plugin lacks, or a
    function in a list of those left out that the FlagGems here lacks.
    """
    return [*_keys(content, plugin), *_policy(content), *_op_backends(content, plugin), *_lists(content, plugin)]


def unread_lists(file: Path, content: dict[str, Any], plugin: Plugin = VLLM) -> list[str]:
    """Return the lists of a user's ``file`` that the installed plugin does not read from there."""
    own = any(file.resolve().is_relative_to(Path(f, CONFIG_FOLDER).resolve()) for f in folders(plugin.package))
    if own or plugin.reads_lists_from_file():
        return []
    return [
        f"{key}: the {plugin.name} that is installed reads no lists from the file of {plugin.config}; export "
        f"{plugin.prefix}{key.upper()}={','.join(listed(content, key))}"
        for key in ("flagos_whitelist", "flagos_blacklist", "oot_blacklist")
        if listed(content, key)
    ]


def _keys(content: dict[str, Any], plugin: Plugin) -> Iterator[str]:
    for key in content:
        if key not in plugin.keys:
            yield f"{NOTE}{key}: {plugin.name}, as it is known here, has no such key{nearest(key, plugin.keys)}"


def _known(
    where: str, name: str, table: tuple[str, ...], here: frozenset[str], plugin: Plugin, what: str
) -> Iterator[str]:
    if name in here or (not here and name in table):
        return
    if name in table:
        yield f"{NOTE}{where}: the {plugin.name} that is installed has no {what} {name}"
    else:
        yield f"{where}: {name} is no {what} of {plugin.name} that is known here{nearest(name, here or table)}"


def _policy(content: dict[str, Any]) -> Iterator[str]:
    prefer = content.get("prefer", PREFER[0])
    if not isinstance(prefer, str) or prefer.strip().lower() not in PREFER:
        yield f"prefer: {prefer!r} is taken for flagos; allowed is one of {', '.join(PREFER)}"
    strict = content.get("strict", False)
    if not isinstance(strict, bool):
        yield f"strict: {strict!r} is taken for {bool(strict)}; write true or false, without quotes"
    for key in ("allow_vendors", "deny_vendors"):
        vendors = content.get(key) or []
        if not isinstance(vendors, str | list):
            yield f"{key}: a {type(vendors).__name__} is ignored; write a list"
            continue
        yield from vendor_faults(key, vendors.split(",") if isinstance(vendors, str) else vendors)


def _op_backends(content: dict[str, Any], plugin: Plugin) -> Iterator[str]:
    chosen = content.get("op_backends") or {}
    if not isinstance(chosen, dict):
        yield f"op_backends: a {type(chosen).__name__} is ignored; write a mapping, operator: [flagos, vendor, ...]"
        return
    here = plugin.dispatched_here() if chosen else frozenset()
    for op, order in chosen.items():
        yield from _known("op_backends", str(op), plugin.dispatched, here, plugin, "dispatched operator")
        tokens = order.split("|") if isinstance(order, str) else order
        if not isinstance(tokens, list):
            yield f"op_backends: {op}: a {type(order).__name__} is ignored; write a list such as [flagos, vendor]"
            continue
        yield from token_faults(f"op_backends: {op}", tokens)


def _lists(content: dict[str, Any], plugin: Plugin) -> Iterator[str]:
    here = plugin.replaced_here() if content.get("oot_blacklist") else frozenset()
    for key in ("flagos_whitelist", "flagos_blacklist", "oot_blacklist"):
        names = content.get(key) or []
        if not isinstance(names, list):
            yield f"{key}: a {type(names).__name__} is ignored; write a list"
            continue
        for name in map(str, names):
            if key == "oot_blacklist":
                yield from _known(key, name, plugin.replaced, here, plugin, "replaced operator")
            else:
                yield from _flaggems_name(key, name)
    if content.get("flagos_whitelist") and content.get("flagos_blacklist"):
        yield "flagos_whitelist and flagos_blacklist are both there; keep one of them"


def _flaggems_name(key: str, name: str) -> Iterator[str]:
    known = flaggems_names()
    if name in WRONG_NAMES and name not in known:
        yield f"{key}: FlagGems has no function {name}; it is called {WRONG_NAMES[name]}"
    elif "." in name or "::" in name:
        yield f"{key}: {name} is torch's name; FlagGems' function is meant, without what follows the dot"
    elif known and name not in known:
        note = NOTE if key == "flagos_blacklist" else ""
        yield f"{note}{key}: the FlagGems that is installed has no function {name}{nearest(name, known)}"


def flaggems_names() -> frozenset[str]:
    """Return the function names of the installed FlagGems, read from its source; empty if there is none.

    FlagGems is not imported, because that takes seconds and needs a chip.
    """
    spec = find_spec("flag_gems")
    if spec is None or spec.origin is None:
        return frozenset()
    return _registered(spec.origin)


@functools.cache
def _registered(source: str) -> frozenset[str]:
    """Return the functions that FlagGems' ``source`` registers; cached, since a check asks for them once per name."""
    tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    pairs = (node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) >= 2)
    functions = (pair.elts[1] for pair in pairs if isinstance(pair.elts[0], ast.Constant))
    return frozenset(
        function.id if isinstance(function, ast.Name) else function.attr
        for function in functions
        if isinstance(function, ast.Name | ast.Attribute)
    )
