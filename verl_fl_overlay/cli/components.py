"""The components that ``doctor`` tries: what asks for each, how it is tried, and what training does without it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from verl_fl_overlay.devices import accelerator, chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.events import Engine
from verl_fl_overlay.features import flagcx, reason_off, te_fl
from verl_fl_overlay.flaggems import library
from verl_fl_overlay.packages import FLAGOS_BUILDS, flagos_builds, installed
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import SGLANG, VLLM, Plugin


@dataclass(frozen=True)
class Component:
    """One component that settings can ask for.

    ``asked`` returns the settings that ask for it, "" if none does.  ``attempt`` imports it as training would, and
    returns what it found; it raises if it cannot be used.  ``without`` is a sentence on training then, "" if the error
    says it.  ``modules`` have to fit one another.
    """

    name: str
    asked: Callable[[Settings], str]
    attempt: Callable[[], dict[str, Any]]
    without: str = ""
    modules: tuple[str, ...] = ()


def _asked_for_flaggems(settings: Settings) -> str:
    if reason_off("flaggems", settings):
        return ""
    return "TRAINING_FL_FLAGGEMS_ENABLE=1" if settings.training_flaggems else "USE_FLAGGEMS=1"


def _try_flaggems() -> dict[str, Any]:
    gems = library.load()
    if not gems.kernels:
        raise OverlayError(f"flag_gems {gems.version} offers no operator for {gems.vendor}")
    here = {"versions": {"flag_gems": gems.version}, "file": _file("flag_gems")}
    return {**here, "vendor": gems.vendor, "operators": len(gems.kernels)}


def _try_flagcx() -> dict[str, Any]:
    return asdict(flagcx.load())


def _asked_for_plugin(plugin: Plugin) -> Callable[[Settings], str]:
    beginnings = (plugin.prefix, f"{plugin.engine.upper()}_FLAGGEMS_")

    def asked(settings: Settings) -> str:
        listed = settings[plugin.switch]
        if plugin.switch in settings.given and (listed or plugin is VLLM):  # for SGLang an empty list is no list
            return f"{plugin.switch}={settings.given[plugin.switch]}" if plugin.entry in listed else ""
        return _some(name for name in os.environ if name.startswith(beginnings))

    return asked


def _try_vllm_plugin() -> dict[str, Any]:
    vllm = _imported("vllm")
    point = _entry_point("vllm.platform_plugins", "fl", "vllm-fl")
    named = point.load()()
    if not named:
        raise OverlayError("the plugin takes this machine for none of its own, so vLLM uses its own platform")
    module, _, attribute = str(named).rpartition(".")
    getattr(importlib.import_module(module), attribute)
    return {"versions": _version(vllm), "file": _file(point.module.partition(".")[0]), "platform": str(named)}


def _try_sglang_plugin() -> dict[str, Any]:
    sglang = _imported("sglang")
    for group in ("sglang.srt.platforms", "sglang.srt.plugins"):
        _entry_point(group, "sglang_fl", "sglang-fl").load()
    return {"versions": _version(sglang), "file": _file("sglang_fl")}


def _asked_for_te_fl(settings: Settings) -> str:
    return _some(te_fl.asked_for_by(settings))


def _try_te_fl() -> dict[str, Any]:
    _need_build("TransformerEngine-FL", "te-fl", "TE_FL_*")
    feature = te_fl.TransformerEngineFL(Settings.parse()[0])
    feature.built(Engine("megatron"))
    told = feature.describe()
    prefer, here = told["policy"]["prefer"], told.get("implementations")
    if here is not None and prefer not in {kind.partition(":")[0] for kind in here}:
        raise OverlayError(f"it is to take {prefer} implementations first and has none here, only {', '.join(here)}")
    return {"file": _file("transformer_engine"), **told}


def _try_megatron_fl() -> dict[str, Any]:
    _need_build("Megatron-LM-FL", "megatron-fl", "MG_FL_PREFER")
    importlib.import_module("megatron.plugin.decorators")
    return {"file": _file("megatron.plugin.decorators")}


def _asked_for_an_accelerator(settings: Settings) -> str:
    chip, told_by = chips.chosen(settings)
    return "" if chip is chips.CPU or not installed("torch") else told_by


def _try_accelerator() -> dict[str, Any]:
    settings, _ = Settings.parse()
    chip, told_by = chips.chosen(settings)
    on_cpu = "Run doctor where training is to run; to train on the CPU, export VERL_FL_DEVICE=cpu"
    if chip is None:
        module = accelerator.accelerator()
        if module is None:
            raise OverlayError(f"torch has no accelerator here ({told_by}). {on_cpu}")
    else:
        needed = f", which {chip.package} brings" if chip.package else ""
        try:
            module = chips.device_module(chip)
        except Exception as error:  # whatever a vendor's package raises
            raise OverlayError(
                f"the chip is {chip.vendor} ({told_by}) and torch has no {chip.device} here{needed}: "
                f"{type(error).__name__}: {error}. Install that, or correct {told_by.partition('=')[0]}"
            ) from error
        if not module.is_available():
            raise OverlayError(f"the chip is {chip.vendor} ({told_by}) and torch.{chip.device} finds none. {on_cpu}")
    return {"device": f"{module.device_count()} x {chip.device if chip else module.__name__.rpartition('.')[2]}"}


ACCELERATOR = "accelerator"

COMPONENTS = (
    Component(ACCELERATOR, _asked_for_an_accelerator, _try_accelerator),
    Component(
        "FlagGems",
        _asked_for_flaggems,
        _try_flaggems,
        "Training would go on with native operators and one warning",
        ("flag_gems", "torch", "triton"),
    ),
    Component(
        "FlagCX",
        lambda settings: "" if reason_off("flagcx", settings) else "USE_FLAGCX=1",
        _try_flagcx,
        "Training would fail at its first process group",
        ("flagcx", "torch"),
    ),
    Component(
        "vllm-plugin-FL",
        _asked_for_plugin(VLLM),
        _try_vllm_plugin,
        "vLLM would go on without the plugin and say so in its log only",
        ("vllm_fl", "vllm", "torch", "flag_gems", "triton"),
    ),
    Component(
        "sglang-plugin-FL",
        _asked_for_plugin(SGLANG),
        _try_sglang_plugin,
        "SGLang would go on without the plugin and say so in its log only",
        ("sglang_fl", "sglang", "torch", "flag_gems", "triton"),
    ),
    Component(
        "TransformerEngine-FL",
        _asked_for_te_fl,
        _try_te_fl,
        "A Megatron engine would compute with other implementations than those of FlagOS",
        ("transformer_engine", "torch"),
    ),
    Component(
        "Megatron-LM-FL",
        lambda settings: "MG_FL_PREFER" if settings["MG_FL_PREFER"] else "",
        _try_megatron_fl,
        "A Megatron engine would compute without the functions of that vendor",
    ),
)


def _some(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    found = sorted(names)
    return ", ".join([*found[:3], *([f"{len(found) - 3} more"] if len(found) > 3 else [])])


def _need_build(build: str, hint: str, variables: str) -> None:
    if not flagos_builds()[build]:
        whose = "NVIDIA's build is" if installed(FLAGOS_BUILDS[build][0]) else "no build is"
        raise OverlayError(
            f"{build} is not installed ({whose} here): verl-fl install-hint {hint}, or unset {variables}"
        )


def _imported(module: str) -> ModuleType:
    if not installed(module):
        raise OverlayError(f"{module} is not installed: verl-fl install-hint {module}")
    return importlib.import_module(module)


def _entry_point(group: str, name: str, whose: str) -> EntryPoint:
    found = list(entry_points(group=group, name=name))
    if not found:
        raise OverlayError(
            f"no installed package has the entry point {name!r} of {group}: verl-fl install-hint {whose}"
        )
    return found[0]


def _file(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__file__", None) or "")


def _version(module: ModuleType) -> dict[str, str]:
    """Return the version that a module itself tells, if it does; metadata may lie."""
    told = getattr(module, "__version__", "")
    return {module.__name__: str(told)} if told else {}
