"""vllm-plugin-FL: its dispatch file checked, and written from the environment; its lists of operators extended.

The plugin is told by the environment and by the file alone: nothing of it is imported or changed.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.events import rollout_plugin_found
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.stack import PREFER

logger = logging.getLogger("verl_fl_overlay")

EXAMPLE = Path(__file__).parent / "nvidia.yaml"
LARGEST = 1 << 16
"""Bytes a dispatch file may have."""

DEEPEST = 8
"""Levels a dispatch file may be nested."""

KEYS = (
    "prefer",
    "strict",
    "allow_vendors",
    "deny_vendors",
    "op_backends",
    "flagos_blacklist",
    "flagos_whitelist",
    "oot_blacklist",
    "action",
    "io_dump",
)
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
"""How a finding begins that is no fault."""


def read(file: Path) -> dict[str, Any]:
    """Read a dispatch file.

    Raises:
        OverlayError: it is not there, larger than ``LARGEST``, not YAML, not one mapping, nested beyond ``DEEPEST``,
            says a key twice, holds a value that is none of its type, or uses aliases, through which a few lines can
            stand for gigabytes.
    """
    yaml = _yaml()

    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)  # no more: it may be a device that never ends
        if len(content) > LARGEST:
            raise OverlayError(f"{file} is too long; a dispatch file has at most {LARGEST} bytes")
        text = content.decode("utf-8")
        _refuse_bombs(file, text)
        _refuse_repeats(file, yaml.compose(text, Loader=yaml.SafeLoader))
        parsed = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OverlayError(f"{file} cannot be read as YAML: {reason}") from error
    except (ValueError, LookupError, AttributeError) as error:  # PyYAML's own slips: of a month 13, of `!!bool maybe`
        raise OverlayError(f"{file} holds a value that is none of its type: {type(error).__name__}: {error}") from error
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise OverlayError(f"{file} holds a {type(parsed).__name__}; expected is a mapping with {', '.join(KEYS)}")
    return {str(key): value for key, value in parsed.items()}


def _yaml() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise OverlayError("a dispatch file is YAML, and PyYAML is not installed: pip install pyyaml") from error


def _refuse_bombs(file: Path, text: str) -> None:
    yaml = _yaml()

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily: it ends at the first fault
        if isinstance(event, yaml.AliasEvent):
            raise OverlayError(
                f"{file} uses YAML's aliases (*name), which a dispatch file does not need; spell them out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise OverlayError(f"{file} is nested more than {DEEPEST} levels deep, which a dispatch file is not")


def _refuse_repeats(file: Path, node: Any) -> None:
    yaml = _yaml()

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(file, item)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise OverlayError(f"{file} says {key.value} twice, and only the last counts; keep one of them")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
            _refuse_repeats(file, value)


def check(content: dict[str, Any]) -> list[str]:
    """Return everything in ``content`` that vllm-plugin-FL would ignore or take for something else.

    To leave out what the FlagGems that is here does not have is noted only: the plugin's own lists name the functions
    of several versions.
    """
    return [*_keys(content), *_policy(content), *_op_backends(content), *_lists(content)]


def _keys(content: dict[str, Any]) -> Iterator[str]:
    for key in content:
        if key not in KEYS:
            yield f"{key}: the plugin has no such key and ignores it{_near(key, KEYS)}"


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


def vendor_faults(where: str, vendors: Iterable[Any]) -> Iterator[str]:
    """Yield what is wrong with a list of vendors; ``where`` it stands begins each text."""
    for vendor in vendors:
        if str(vendor) != str(vendor).lower():
            yield f"{where}: {vendor!r} matches no vendor; write {str(vendor).lower()!r}, names are in lower case"


def _op_backends(content: dict[str, Any]) -> Iterator[str]:
    chosen = content.get("op_backends") or {}
    if not isinstance(chosen, dict):
        yield f"op_backends: a {type(chosen).__name__} is ignored; write a mapping, operator: [flagos, vendor, ...]"
        return
    for op, order in chosen.items():
        if op not in DISPATCHED:
            yield f"op_backends: {op} is no operator of the dispatch that is known here{_near(op, DISPATCHED)}"
        tokens = order.split("|") if isinstance(order, str) else order
        if not isinstance(tokens, list):
            yield f"op_backends: {op}: a {type(order).__name__} is ignored; write a list such as [flagos, vendor]"
            continue
        yield from token_faults(f"op_backends: {op}", tokens)


def token_faults(where: str, tokens: Iterable[Any]) -> Iterator[str]:
    """Yield what is wrong with an operator's order of implementations; ``where`` it stands begins each text."""
    for token in (str(token).strip() for token in tokens):
        kind, _, name = token.partition(":")
        if token not in PREFER and not (kind in ("vendor", "impl") and name):
            yield f"{where}: {token!r} matches nothing{_near(token, PREFER)}"
        elif kind == "vendor" and name != name.lower():
            yield f"{where}: {token!r} matches no vendor; write vendor:{name.lower()}"


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
        yield f"{key}: {name} is none of vLLM's custom operators that are replaced{_near(name, CUSTOM_OPS)}"


def _flaggems_name(key: str, name: str) -> Iterator[str]:
    known = flaggems_names()
    if name in WRONG_NAMES and name not in known:
        yield f"{key}: FlagGems has no function {name}; it is called {WRONG_NAMES[name]}"
    elif "." in name or "::" in name:
        yield f"{key}: {name} is torch's name; FlagGems' function is meant, without what follows the dot"
    elif known and name not in known:
        note = NOTE if key == "flagos_blacklist" else ""
        yield f"{note}{key}: the FlagGems that is installed has no function {name}{_near(name, known)}"


def _near(name: Any, known: Any) -> str:
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"; {found[0]}?" if found else ""


def flaggems_names() -> frozenset[str]:
    """Return the function names of the installed FlagGems, read from its source; empty if there is none.

    It is not imported: that takes seconds and a chip.
    """
    spec = find_spec("flag_gems")
    if spec is None or spec.origin is None:
        return frozenset()
    return _registered(spec.origin)


@functools.cache
def _registered(source: str) -> frozenset[str]:
    """Return the functions that FlagGems' ``source`` registers: thousands of lines, and asked for with every name."""
    tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    pairs = (node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) >= 2)
    functions = (pair.elts[1] for pair in pairs if isinstance(pair.elts[0], ast.Constant))
    return frozenset(
        function.id if isinstance(function, ast.Name) else function.attr
        for function in functions
        if isinstance(function, ast.Name | ast.Attribute)
    )


def defaults(vendor: str) -> tuple[dict[str, Any], str]:
    """Return the plugin's own configuration for ``vendor`` (FlagGems' name), and where it came from.

    Raises:
        OverlayError: nobody knows the vendor, or the file cannot be read.
    """
    file = _configuration(vendor)
    if file is not None:
        return read(file), str(file)
    if vendor == "nvidia":
        return read(EXAMPLE), "the overlay's example"
    if vendor not in chips.CHIPS:
        raise OverlayError(f"{vendor!r} is no vendor that is known here: {', '.join(chips.CHIPS)}")
    return {}, f"nothing: vllm-plugin-FL, or its configuration for {vendor}, is not installed"


def _configuration(vendor: str) -> Path | None:
    """Return the installed plugin's file for ``vendor``; it may go by torch's name of the device, as for musa."""
    spec = find_spec("vllm_fl")
    device = chips.CHIPS[vendor].device if vendor in chips.CHIPS else vendor
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in (vendor, device):
            file = Path(folder) / "dispatch" / "config" / f"{name}.yaml"
            if file.is_file():
                return file
    return None


def _given(settings: Settings) -> Path | None:
    """Return the file of VLLM_FL_CONFIG, which takes the place of the plugin's own."""
    file = Path(settings["VLLM_FL_CONFIG"])
    return file if file.is_file() else None


LISTS = {"VLLM_FL_FLAGOS_BLACKLIST": "flagos_blacklist", "VLLM_FL_OOT_BLACKLIST": "oot_blacklist"}
"""Variables that the plugin takes in place of a list in its configuration -> the list."""

_added: dict[str, list[str]] = {}


def reason_off(settings: Settings) -> str:
    """Return why the lists are as they were set, "" if there is one to extend."""
    return "" if any(settings[name] for name in LISTS) else f"neither {' nor '.join(LISTS)} is set"


def start(settings: Settings) -> Callable[[], None]:
    """Extend the lists whenever vLLM finds the plugin; call what is returned to stop.

    Raises:
        OverlayError: VERL_FL_STRICT=1, and the plugin's configuration cannot be read.  Later would be too late: vLLM
            takes whatever a plugin raises for its absence.
    """
    if settings.strict:
        _configured(settings)
    return rollout_plugin_found.subscribe(extend_lists)


def extend_lists() -> None:
    """Add to the lists in this process's environment what the plugin's configuration leaves out on this chip.

    The file of VLLM_FL_CONFIG is the place for a list that is meant exactly.  Processes started from here have the
    longer lists too.

    Raises:
        OverlayError: the file cannot be read.
    """
    settings, _ = Settings.parse()
    file, content = _configured(settings)
    if file is None and not settings["VLLM_FL_CONFIG"]:
        _warn_of_no_configuration()
    for name, key in LISTS.items():
        missing = [op for op in _listed(content, key) if op not in settings[name]]
        if settings[name] and missing:
            os.environ[name] = ",".join((*settings[name], *missing))
            _added[name] = missing
            logger.info(
                "%s: added %s from %s, whose list it would have replaced (VERL_FL_DISABLE=rollout.lists keeps yours)",
                name,
                ", ".join(missing),
                file,
            )


@functools.cache
def _warn_of_no_configuration() -> None:
    """Warn once: vLLM asks the plugin several times."""
    chip, told_by = chips.find()
    logger.warning(
        "rollout's lists stay as they were set: vllm-plugin-FL has no configuration for %s here (%s), so nothing of "
        "the chip's own is added; if that is not the chip, export GEMS_VENDOR=<its vendor>",
        chip.vendor if chip else "an unknown chip",
        told_by,
    )


def _configured(settings: Settings) -> tuple[Path | None, dict[str, Any]]:
    """Return the file that the plugin goes by, and what it says: that of VLLM_FL_CONFIG, or its own for the chip.

    Where VLLM_FL_CONFIG names no file the plugin goes by none, not by its own.
    """
    if settings["VLLM_FL_CONFIG"]:
        file = _given(settings)
    else:
        chip, _ = chips.find()
        file = _configuration(chip.vendor) if chip else None
    return file, read(file) if file else {}


def _listed(content: dict[str, Any], key: str) -> list[str]:
    """Return a list of names as the plugin reads it: what is no list is none."""
    names = content.get(key)
    return [str(name) for name in names] if isinstance(names, list) else []


def describe() -> dict[str, Any]:
    """Return what was added to which list in this process."""
    return {f"added to {name}": names for name, names in _added.items()}


def render(settings: Settings, vendor: str = "") -> str:
    """Return a dispatch file that does what the environment asks for, on top of the plugin's defaults for ``vendor``
    (FlagGems' name) or, where none is named, of the file of VLLM_FL_CONFIG, else of the defaults for this machine.

    An empty file counts as none: the shell makes it so before ``render > $VLLM_FL_CONFIG`` starts.

    A blacklist extends the one in that file instead of taking its place; a whitelist stands alone.
    """
    yaml = _yaml()

    given = None if vendor else _given(settings)
    found, _ = chips.find()
    vendor = vendor or (found.vendor if found else "nvidia")
    content, origin = (read(given), str(given)) if given and given.stat().st_size else defaults(vendor)
    for key, name in (("prefer", "VLLM_FL_PREFER"), ("strict", "VLLM_FL_STRICT")):
        if name in settings.given:
            content[key] = settings[name] == "1" if key == "strict" else settings[name]
    for key, name in (("allow_vendors", "VLLM_FL_ALLOW_VENDORS"), ("deny_vendors", "VLLM_FL_DENY_VENDORS")):
        if settings[name]:
            content[key] = list(settings[name])
    per_op = {op: list(tokens) for op, tokens in settings["VLLM_FL_PER_OP"].items()}
    if per_op:
        own = content.get("op_backends")
        content["op_backends"] = {**(own if isinstance(own, dict) else {}), **per_op}
    if settings["VLLM_FL_FLAGOS_WHITELIST"]:
        content.pop("flagos_blacklist", None)
        content["flagos_whitelist"] = list(settings["VLLM_FL_FLAGOS_WHITELIST"])
    else:
        added = (*settings["VLLM_FL_FLAGOS_BLACKLIST"], *settings["VLLM_FL_FLAGOS_BLACKLIST_APPEND"])
        if added:
            content["flagos_blacklist"] = list(dict.fromkeys([*_listed(content, "flagos_blacklist"), *added]))
    if settings["VLLM_FL_OOT_BLACKLIST"]:
        own = _listed(content, "oot_blacklist")
        content["oot_blacklist"] = list(dict.fromkeys([*own, *settings["VLLM_FL_OOT_BLACKLIST"]]))
    head = [f"# vllm-plugin-FL's dispatch for {vendor}, by verl-fl dispatch render; defaults from {origin}."]
    before = sorted(name for name in settings.given if name in _READ_BEFORE_THE_FILE)
    if before:
        head.append(f"# Unset {', '.join(before)}: set, they go before this file.")
    return "\n".join(head) + "\n" + str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


_READ_BEFORE_THE_FILE = (
    "VLLM_FL_PREFER",
    "VLLM_FL_FLAGOS_WHITELIST",
    "VLLM_FL_FLAGOS_BLACKLIST",
    "VLLM_FL_FLAGOS_BLACKLIST_APPEND",
    "VLLM_FL_OOT_BLACKLIST",
)
