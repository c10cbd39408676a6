"""A dispatch file for vllm-plugin-FL, made from the environment."""

from __future__ import annotations

from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch.file import defaults, given_file, listed, pyyaml, read
from verl_fl_overlay.settings import Settings


def render(settings: Settings, vendor: str = "") -> str:
    """Return a dispatch file that adds to a base file what the environment asks for.

    The base is the plugin's defaults for ``vendor`` (FlagGems' name).  If no vendor is named, it is the file of
    VLLM_FL_CONFIG, else the defaults for this machine.  An empty file counts as none: the shell empties it before
    ``render > $VLLM_FL_CONFIG`` starts.  A blacklist extends the base's; a whitelist replaces the base's two lists.
    """
    given = None if vendor else given_file(settings)
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
            content["flagos_blacklist"] = list(dict.fromkeys([*listed(content, "flagos_blacklist"), *added]))
    if settings["VLLM_FL_OOT_BLACKLIST"]:
        own = listed(content, "oot_blacklist")
        content["oot_blacklist"] = list(dict.fromkeys([*own, *settings["VLLM_FL_OOT_BLACKLIST"]]))
    head = [f"# vllm-plugin-FL's dispatch for {vendor}, by verl-fl dispatch render; defaults from {origin}."]
    before = sorted(name for name in settings.given if name in _READ_BEFORE_THE_FILE)
    if before:
        head.append(f"# Unset {', '.join(before)}: set, they go before this file.")
    return "\n".join(head) + "\n" + str(pyyaml().safe_dump(content, sort_keys=False, allow_unicode=True))


_READ_BEFORE_THE_FILE = (
    "VLLM_FL_PREFER",
    "VLLM_FL_FLAGOS_WHITELIST",
    "VLLM_FL_FLAGOS_BLACKLIST",
    "VLLM_FL_FLAGOS_BLACKLIST_APPEND",
    "VLLM_FL_OOT_BLACKLIST",
)
