"""The configuration file of a plugin for rollout: found where the plugin finds it, and read with limits.

The overlay controls a plugin through the environment and this file only; it does not import or change the plugin.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.packages import folders
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import CONFIG_FOLDER, VLLM, Plugin

EXAMPLE = Path(__file__).parent / "nvidia.yaml"
LARGEST = 1 << 16
"""Bytes a dispatch file may have."""

DEEPEST = 8
"""Levels a dispatch file may be nested."""

OF_DEVICE = {"cuda": "nvidia", "npu": "ascend", "musa": "musa", "txda": "tsingmicro"}
"""The device that torch has -> sglang-plugin-FL's file for it, whoever made the chip."""


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
        raise OverlayError(f"{file} holds a {type(parsed).__name__}; expected is a mapping, such as prefer: flagos")
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


def defaults(plugin: Plugin, vendor: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Return the plugin's own configuration for ``vendor`` (FlagGems' name), and where it came from.

    Raises:
        OverlayError: nobody knows the vendor, or the file cannot be read.
    """
    if vendor not in chips.CHIPS:
        raise OverlayError(f"{vendor!r} is no vendor that is known here: {', '.join(chips.CHIPS)}")
    files = own_files(plugin, chips.CHIPS[vendor], settings)
    if files:
        return read(files[-1]), str(files[-1])
    if plugin is VLLM and vendor == "nvidia":
        return read(EXAMPLE), "the overlay's example"
    return {}, f"nothing: {plugin.name}, or its configuration for {vendor}, is not installed"


def own_files(plugin: Plugin, chip: chips.Chip, settings: Settings) -> list[Path]:
    """Return the installed plugin's files for ``chip``; of several, the card decides which one the plugin takes.

    vllm-plugin-FL's files have the vendor's name, or torch's name of a device that only this vendor has, as for musa;
    one of its own is for long contexts on NVIDIA's Hopper.  sglang-plugin-FL goes by the device alone.
    """
    if plugin is VLLM:
        names = [chip.vendor, *([chip.device] if chip.package else [])]
        long_contexts = chip.vendor == "nvidia" and settings["VLLM_FL_HOPPER_LONG_CONTEXT_OPT"]
    else:
        names = [OF_DEVICE.get(chip.device) or settings["SGLANG_FL_PLATFORM"]]
        long_contexts = False
    places = [Path(folder, CONFIG_FOLDER) for folder in folders(plugin.package)]
    found = [place / f"{name}.yaml" for name in names for place in places if (place / f"{name}.yaml").is_file()]
    hopper = [place / "nvidia_hopper.yaml" for place in places if long_contexts]
    return [*found[:1], *filter(Path.is_file, hopper)]


def given_file(plugin: Plugin, settings: Settings) -> Path | None:
    """Return the file that the plugin's variable names, None if there is none."""
    file = Path(settings[plugin.config])
    return file if file.is_file() else None


def configured(plugin: Plugin, settings: Settings) -> tuple[list[Path], dict[str, list[str]]]:
    """Return the files whose lists of operators the plugin uses, and key -> list, for the lists of ``plugin.lists``.

    That is the file that the plugin's variable names, if this version reads lists there, else the chip's own.  If the
    variable names a file that does not exist, vllm-plugin-FL uses none, and sglang-plugin-FL the chip's own.

    Raises:
        OverlayError: a file cannot be read.
    """
    given = given_file(plugin, settings)
    if settings[plugin.config] and plugin.reads_lists_from_file() and (given or plugin.file_first):
        files = [given] if given else []
    else:
        chip, _ = chips.find()
        files = own_files(plugin, chip, settings) if chip else []
    contents = [read(file) for file in files]
    lists = {key: [name for c in contents for name in listed(c, key)] for key in plugin.lists.values()}
    return files, {key: list(dict.fromkeys(names)) for key, names in lists.items()}


def listed(content: dict[str, Any], key: str) -> list[str]:
    """Return a list of names as the plugins read it: any other type counts as empty."""
    names = content.get(key)
    return [str(name) for name in names] if isinstance(names, list) else []
