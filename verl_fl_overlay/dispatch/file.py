"""vllm-plugin-FL's dispatch file: found where the plugin finds it, and read with limits.

The overlay controls the plugin through the environment and this file only; it does not import or change the plugin.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.packages import folders
from verl_fl_overlay.settings import Settings

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


def read(file: Path) -> dict[str, Any]:
    """Read a dispatch file.

    Raises:
        OverlayError: it is not there, larger than ``LARGEST``, not YAML, not one mapping, nested beyond ``DEEPEST``,
            repeats a key, holds a value that does not fit its type, or uses aliases, with which a few lines can
            expand to gigabytes.
    """
    yaml = pyyaml()
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)  # a limit, because a device never ends
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


def pyyaml() -> Any:
    """Return PyYAML, which the overlay does not require.

    Raises:
        OverlayError: it is not installed.
    """
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise OverlayError("a dispatch file is YAML, and PyYAML is not installed: pip install pyyaml") from error


def _refuse_bombs(file: Path, text: str) -> None:
    yaml = pyyaml()
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily, so that it stops at the first fault
        if isinstance(event, yaml.AliasEvent):
            raise OverlayError(
                f"{file} uses YAML's aliases (*name), which a dispatch file does not need; spell them out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise OverlayError(f"{file} is nested more than {DEEPEST} levels deep, which a dispatch file is not")


def _refuse_repeats(file: Path, node: Any) -> None:
    yaml = pyyaml()
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
    """Return the installed plugin's file for ``vendor``; its name may be torch's device name, as for musa."""
    device = chips.CHIPS[vendor].device if vendor in chips.CHIPS else vendor
    for folder in folders("vllm_fl"):
        for name in (vendor, device):
            file = Path(folder) / "dispatch" / "config" / f"{name}.yaml"
            if file.is_file():
                return file
    return None


def given_file(settings: Settings) -> Path | None:
    """Return the file of VLLM_FL_CONFIG, which replaces the plugin's own."""
    file = Path(settings["VLLM_FL_CONFIG"])
    return file if file.is_file() else None


def configured(settings: Settings) -> tuple[Path | None, dict[str, Any]]:
    """Return the file that the plugin uses, and its content: that of VLLM_FL_CONFIG, or the plugin's for the chip.

    If VLLM_FL_CONFIG names a file that does not exist, the plugin uses no file, not even its own.

    Raises:
        OverlayError: the file cannot be read.
    """
    if settings["VLLM_FL_CONFIG"]:
        file = given_file(settings)
    else:
        chip, _ = chips.find()
        file = _configuration(chip.vendor) if chip else None
    return file, read(file) if file else {}


def listed(content: dict[str, Any], key: str) -> list[str]:
    """Return a list of names as the plugin reads it: any other type counts as empty."""
    names = content.get(key)
    return [str(name) for name in names] if isinstance(names, list) else []
