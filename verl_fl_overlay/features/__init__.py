"""The features: what each is for, and when the settings leave it out.

A feature's module is imported only when the feature starts, so a feature that is off costs no time at load.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.packages import flagos_builds, installed
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import REPLACED_LISTS


@dataclass(frozen=True)
class Entry:
    """What is known of a feature before it starts.

    ``home`` is its class, as ``module:class`` below this package; "" if the feature consists of hooks only.
    ``reason_off`` returns "" when the settings ask for it.  ``fed_by`` names another feature if this one depends on
    that feature's hooks; it may have some of its own that it can do without.
    """

    name: str
    summary: str
    home: str = ""
    reason_off: Callable[[Settings], str] = lambda settings: ""
    fed_by: str = ""

    def make(self, settings: Settings) -> Feature:
        """Import the feature's module and return the feature, not started yet."""
        module, _, name = self.home.partition(":")
        made: Feature = getattr(importlib.import_module(f"{__name__}.{module}"), name)(settings)
        return made


def _rollout_off(settings: Settings) -> str:
    return "" if any(settings[name] for name in REPLACED_LISTS) else f"none of {', '.join(REPLACED_LISTS)} is set"


def _flagcx_off(settings: Settings) -> str:
    if settings.device == "cpu":
        return "VERL_FL_DEVICE=cpu: a CPU communicates through gloo"
    return "" if settings["USE_FLAGCX"] else "USE_FLAGCX is not on"


def _chip_off(settings: Settings) -> str:
    chip, told_by = chips.chosen(settings)
    if chip is None:
        return told_by
    return f"verl has a platform for {chip.vendor} ({told_by})" if chip.vendor in chips.KNOWN_TO_VERL else ""


def _te_fl_off(settings: Settings) -> str:
    return "" if any(flagos_builds().values()) else "neither TransformerEngine-FL nor Megatron-LM-FL is installed"


def _head_off(settings: Settings) -> str:
    return "VERL_FL_HEAD=logits" if settings.head == "logits" else ""


def _cpu_off(settings: Settings) -> str:
    return "" if settings.device == "cpu" else "VERL_FL_DEVICE is not cpu"


def _flaggems_off(settings: Settings) -> str:
    if settings.training_flaggems is False:
        return "TRAINING_FL_FLAGGEMS_ENABLE=0"
    if not settings.flaggems_in_training:
        lists = settings.flagos_whitelist or settings.flagos_blacklist or settings.ops != ("auto",)
        return "USE_FLAGGEMS is not set" + (", so the lists of operators have no effect" if lists else "")
    return "VERL_FL_OPS=none" if settings.ops == ("none",) else ""


def _fused_off(settings: Settings) -> str:
    if not settings.fused:
        return "VERL_FL_FUSED=0"
    if settings.device == "cpu":
        return "there are no kernels for the CPU"
    if settings.fused == ("auto",) and not installed("triton"):
        return "triton is not installed"
    return ""


def _recompute_off(settings: Settings) -> str:
    return "VERL_FL_RECOMPUTE is all" if settings.recompute == "all" else ""


FEATURES = {
    entry.name: entry
    for entry in (
        Entry("phase", "tells when verl trains: engines built, initialised, entered and left", "engines:Engines"),
        Entry(
            "attention",
            "flash_attention_2 and packed sequences without flash-attn and TransformerEngine, on any device",
            "attention:Attention",
        ),
        Entry("megatron", "Megatron's models of megatron-core's own layers where TransformerEngine is missing"),
        Entry("activations", "verl's offload of activations, with right gradients without gradient checkpointing"),
        Entry("ray", "the overlay and its settings in every process that Ray starts", "ray:Ray"),
        Entry(
            "rollout_engine",
            "a rollout engine that is missing, or does not fit, is named before Ray starts",
            "rollout_engine:RolloutEngine",
        ),
        Entry("rollout", "rollout's lists of operators extend the chip's own", "rollout:Rollout", _rollout_off),
        Entry("flagcx", "collectives of training through FlagCX", "flagcx:FlagCX", _flagcx_off),
        Entry("chip", "chips that verl has no platform for, the CPU among them", "chip:UnknownChip", _chip_off),
        Entry(
            "te_fl",
            "the policies of TransformerEngine-FL and Megatron-LM-FL",
            "te_fl:TransformerEngineFL",
            _te_fl_off,
            fed_by="phase",
        ),
        Entry(
            "logprobs",
            "token log-probs in fp32 where flash-attn is missing, in one pass and without a copy of the logits",
            "logprobs:Logprobs",
        ),
        Entry("head", "log-probs and entropy without all logits, where these would not fit", "head:Head", _head_off),
        Entry("cpu", "training on a machine without an accelerator", "cpu:Cpu", _cpu_off),
        Entry(
            "flaggems",
            "FlagGems' operators while verl trains",
            "flaggems:Routing",
            _flaggems_off,
            fed_by="phase",
        ),
        Entry(
            "enablers",
            "FlagGems where others enable it: a tuning database per process, and told what it does to training",
            "enablers:Enablers",
            fed_by="phase",
        ),
        Entry(
            "fused",
            "the model's RMS norms, gated MLPs and rotary embeddings, and its Adam, on fused kernels",
            "fused:Fused",
            _fused_off,
            fed_by="phase",
        ),
        Entry(
            "recompute",
            "gradient checkpointing for fewer layers: all but N, none, or as many as the memory needs",
            "recompute:Recompute",
            _recompute_off,
            fed_by="phase",
        ),
    )
}


def reason_off(name: str, settings: Settings) -> str:
    """Return why ``settings`` leave the feature out, "" if they do not."""
    return FEATURES[name].reason_off(settings) if name in FEATURES else f"there is no feature {name}"


class Features:
    """The features that the settings of one activation ask for."""

    def __init__(self, settings: Settings) -> None:
        self.off = {name: reason for name, entry in FEATURES.items() if (reason := entry.reason_off(settings))}
        """Why the settings leave a feature out."""
        self._settings = settings
        self._started: dict[str, Feature] = {}
        self._stop = ExitStack()

    def start(self) -> None:
        """Start them in the order of ``FEATURES``.  If one cannot start, all are stopped and its error is raised.

        Nothing is done where they are started already.
        """
        if self._started:
            return
        with ExitStack() as stop:
            stop.callback(self._started.clear)
            for entry in FEATURES.values():
                if entry.home and entry.name not in self.off:
                    feature = entry.make(self._settings)
                    stop.callback(feature.stop)
                    feature.start()
                    self._started[entry.name] = feature
            self._stop = stop.pop_all()

    def stop(self) -> None:
        """Stop all of them, the last one first, also where one raises.  The last error is raised in the end."""
        self._stop.close()

    def describe(self, name: str) -> dict[str, Any]:
        """Return a feature's description; nothing if it was not started."""
        return self._started[name].describe() if name in self._started else {}

    def rehearse(self) -> None:
        """Let each started feature act once on small data, so that its description tells of it."""
        for feature in self._started.values():
            feature.rehearse()
