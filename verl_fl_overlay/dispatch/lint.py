"""Finds what vllm-plugin-FL would ignore or misunderstand in a dispatch file."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay.dispatch.file import KEYS
from verl_fl_overlay.errors import nearest
from verl_fl_overlay.settings.conflicts import token_faults, vendor_faults
from verl_fl_overlay.settings.stack import PREFER

CUSTOM_OPS = ("silu_and_mul", "gelu_and_mul", "rms_norm", "rotary_embedding", "unquantized_fused_moe_method")
DISPATCHED = (
    "attention_backend",
    "dynamic_per_token_quant_int8",
    "gelu_and_mul",
    "grouped_topk",
    "invoke_fused_moe_triton_kernel",
    "moe_align_block_size",
    "moe_sum",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "topk_softmax",
)
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


def check(content: dict[str, Any]) -> list[str]:
    """Return everything in ``content`` that vllm-plugin-FL would ignore or misunderstand.

    If a list leaves out a function that the FlagGems here does not have, that is only a note: the plugin's own lists
    name the functions of several versions.
    """
    return [*_keys(content), *_policy(content), *_op_backends(content), *_lists(content)]


def _keys(content: dict[str, Any]) -> Iterator[str]:
    for key in content:
        if key not in KEYS:
            yield f"{key}: the plugin has no such key and ignores it{nearest(key, KEYS)}"


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


def _op_backends(content: dict[str, Any]) -> Iterator[str]:
    chosen = content.get("op_backends") or {}
    if not isinstance(chosen, dict):
        yield f"op_backends: a {type(chosen).__name__} is ignored; write a mapping, operator: [flagos, vendor, ...]"
        return
    for op, order in chosen.items():
        if op not in DISPATCHED:
            yield f"op_backends: {op} is no operator of the dispatch that is known here{nearest(op, DISPATCHED)}"
        tokens = order.split("|") if isinstance(order, str) else order
        if not isinstance(tokens, list):
            yield f"op_backends: {op}: a {type(order).__name__} is ignored; write a list such as [flagos, vendor]"
            continue
        yield from token_faults(f"op_backends: {op}", tokens)


def _lists(content: dict[str, Any]) -> Iterator[str]:
    for key in ("flagos_whitelist", "flagos_blacklist", "oot_blacklist"):
        names = content.get(key) or []
        if not isinstance(names, list):
            yield f"{key}: a {type(names).__name__} is ignored; write a list"
            continue
        for name in names:
            yield from (_custom_op if key == "oot_blacklist" else _flaggems_name)(key, str(name))
    if content.get("flagos_whitelist") and content.get("flagos_blacklist"):
        yield "flagos_whitelist and flagos_blacklist are both there; keep one of them"


def _custom_op(key: str, name: str) -> Iterator[str]:
    if name == "fused_moe":
        yield f"{key}: fused_moe has no effect; the operator is called unquantized_fused_moe_method"
    elif name not in CUSTOM_OPS:
        yield f"{key}: {name} is none of vLLM's custom operators that are replaced{nearest(name, CUSTOM_OPS)}"


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
