"""A configuration file for a plugin for rollout, made from the environment."""

from __future__ import annotations

import json
from pathlib import Path

from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch.file import defaults, given_file, listed, pyyaml, read
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import VLLM, Plugin


def render(settings: Settings, vendor: str = "", plugin: Plugin = VLLM) -> str:
    """Return a configuration file that adds to a base file what the environment asks for.

    The base is the plugin's defaults for ``vendor`` (FlagGems' name).  If no vendor is named, it is the file of
    VLLM_FL_CONFIG or SGLANG_FL_CONFIG, else the defaults for the chip that training is to run on.  An empty file counts
    as none: the shell empties it before ``render > $VLLM_FL_CONFIG`` starts.  A blacklist extends the base's; a
    whitelist replaces the base's two lists.

    Raises:
        OverlayError: no vendor is named and no chip is known, or a file cannot be read.
    """
    prefix = plugin.prefix
    given = None if vendor else given_file(plugin, settings)
    if given and given.stat().st_size:
        content, origin, subject = read(given), str(given), ""
    else:
        vendor = vendor or _vendor(settings)
        content, origin = defaults(plugin, vendor, settings)
        subject = f" for {vendor}"
    for key, name in (("prefer", f"{prefix}PREFER"), ("strict", f"{prefix}STRICT")):
        if name in settings.given:
            content[key] = settings[name] == "1" if key == "strict" else settings[name]
    for key in ("allow_vendors", "deny_vendors"):
        if settings[f"{prefix}{key.upper()}"]:
            content[key] = list(settings[f"{prefix}{key.upper()}"])
    per_op = {op: list(tokens) for op, tokens in settings[f"{prefix}PER_OP"].items()}
    if plugin is VLLM and settings["VLLM_FL_OP_CONFIG"]:
        chosen = json.loads(Path(settings["VLLM_FL_OP_CONFIG"]).read_text(encoding="utf-8"))
        per_op |= {op: [token.strip() for token in tokens.split("|")] for op, tokens in chosen.items()}
    if per_op:
        own = content.get("op_backends")
        content["op_backends"] = {**(own if isinstance(own, dict) else {}), **per_op}
    whitelist = f"{prefix}FLAGOS_WHITELIST"
    if settings[whitelist] and "flagos_whitelist" in plugin.keys:
        content.pop("flagos_blacklist", None)
        content["flagos_whitelist"] = list(settings[whitelist])
    for name, key in plugin.lists.items():
        added = settings[name]
        if plugin is VLLM and key == "flagos_blacklist" and not settings[whitelist]:
            added = (*added, *settings["VLLM_FL_FLAGOS_BLACKLIST_APPEND"])
        if added:
            content[key] = list(dict.fromkeys([*listed(content, key), *added]))
    head = [f"# {plugin.name}'s configuration{subject}, by verl-fl dispatch render; defaults from {origin}."]
    head += _beside(settings, plugin)
    return "\n".join(head) + "\n" + str(pyyaml().safe_dump(content, sort_keys=False, allow_unicode=True))


def _vendor(settings: Settings) -> str:
    chip, told_by = chips.chosen(settings)
    if chip is None or chip is chips.CPU:
        raise OverlayError(f"for which chip? {told_by}; name its vendor: --vendor, one of {', '.join(chips.CHIPS)}")
    return chip.vendor


def _beside(settings: Settings, plugin: Plugin) -> list[str]:
    """Return which variables go before the file, and which have to stay because the plugin reads no lists from it."""
    lists = [f"{plugin.prefix}FLAGOS_WHITELIST", *plugin.lists]
    if plugin is VLLM:
        lists.append("VLLM_FL_FLAGOS_BLACKLIST_APPEND")
    policy = ["PREFER"] if plugin.file_first else ["PREFER", "STRICT", "PER_OP", "ALLOW_VENDORS", "DENY_VENDORS"]
    first = [f"{plugin.prefix}{name}" for name in policy]
    stay = [] if plugin.reads_lists_from_file() else lists
    if "flagos_whitelist" not in plugin.keys:
        stay = [lists[0]]
    unset = sorted(name for name in settings.given if name in (*first, *lists) and name not in stay)
    kept = sorted(name for name in settings.given if name in stay)
    lines = [f"# Unset {', '.join(unset)}: set, they go before this file."] if unset else []
    if kept:
        lines.append(f"# Keep {', '.join(kept)}: this {plugin.name} does not read them from a file.")
    return lines
