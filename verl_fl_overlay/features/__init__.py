"""The features that hooks serve: what each is for, and when the settings leave it out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch import vllm_fl
from verl_fl_overlay.features import flagcx, te_fl
from verl_fl_overlay.packages import installed
from verl_fl_overlay.settings import Settings


@dataclass(frozen=True)
class Feature:
    """A part of the overlay that can be on or off; ``reason_off`` returns "" when the settings ask for it.

    ``start`` subscribes the feature to the events it acts on and returns what takes that back; ``describe`` tells the
    report, in JSON's types, what the feature did.  Both import the feature's module themselves, so that a feature that
    is off costs nothing at load.  ``fed_by`` names the feature whose hooks it lives on where that is not itself.
    """

    name: str
    summary: str
    reason_off: Callable[[Settings], str] = lambda settings: ""
    start: Callable[[Settings], Callable[[], None]] | None = None
    describe: Callable[[], dict[str, Any]] | None = None
    fed_by: str = ""


def _describe_logprobs() -> dict[str, Any]:
    logprobs = sys.modules.get("verl_fl_overlay.kernels.logprobs")  # not there before the first log-prob
    return {"kernels": logprobs.kernels_used() if logprobs else {}}


def _flaggems_off(settings: Settings) -> str:
    if settings.training_flaggems is False:
        return "TRAINING_FL_FLAGGEMS_ENABLE=0"
    if settings.training_flaggems is None and not settings.use_flaggems:
        lists = settings.flagos_whitelist or settings.flagos_blacklist or settings.ops != ("auto",)
        return "USE_FLAGGEMS is not set" + (", so the lists of operators have no effect" if lists else "")
    return "VERL_FL_OPS=none" if settings.ops == ("none",) else ""


def _start_flaggems(settings: Settings) -> Callable[[], None]:
    from verl_fl_overlay import flaggems

    return flaggems.start(settings)


def _describe_flaggems() -> dict[str, Any]:
    from verl_fl_overlay import flaggems

    return flaggems.describe()


def _fused_off(settings: Settings) -> str:
    if not settings.fused:
        return "VERL_FL_FUSED=0"
    if settings.device == "cpu":
        return "there are no kernels for the CPU"
    if settings.fused == ("auto",) and not installed("triton"):
        return "triton is not installed"
    return ""


def _start_fused(settings: Settings) -> Callable[[], None]:
    from verl_fl_overlay.kernels import fused

    return fused.start(settings)


def _describe_fused() -> dict[str, Any]:
    from verl_fl_overlay.kernels import fused

    return fused.describe()


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("phase", "tells when verl trains: engines built, initialised, entered and left"),
        Feature("attention", "padding and value models without the flash-attn package, on any device"),
        Feature("ray", "the overlay and its settings in every process that Ray starts"),
        Feature(
            "rollout",
            "rollout's lists of operators extend the chip's own",
            vllm_fl.reason_off,
            start=vllm_fl.start,
            describe=vllm_fl.describe,
        ),
        Feature("flagcx", "collectives of training through FlagCX", flagcx.reason_off, describe=flagcx.describe),
        Feature(
            "chip",
            "chips that verl has no platform for, the CPU among them",
            chips.reason_off,
            start=chips.start,
            describe=chips.describe,
        ),
        Feature(
            "te_fl",
            "the policies of TransformerEngine-FL and Megatron-LM-FL",
            te_fl.reason_off,
            start=te_fl.start,
            describe=te_fl.describe,
            fed_by="phase",
        ),
        Feature(
            "logprobs",
            "token log-probs in fp32 where flash-attn is missing, in one pass and without a copy of the logits",
            describe=_describe_logprobs,
        ),
        Feature(
            "cpu",
            "training on a machine without an accelerator",
            lambda settings: "" if settings.device == "cpu" else "VERL_FL_DEVICE is not cpu",
        ),
        Feature(
            "flaggems",
            "FlagGems' operators while verl trains",
            _flaggems_off,
            start=_start_flaggems,
            describe=_describe_flaggems,
            fed_by="phase",
        ),
        Feature(
            "fused",
            "the model's RMS norms, gated MLPs and rotary embeddings, and its Adam, on fused kernels",
            _fused_off,
            start=_start_fused,
            describe=_describe_fused,
            fed_by="phase",
        ),
    )
}


def reason_off(name: str, settings: Settings) -> str:
    """Return why ``settings`` leave the feature out, "" if they do not."""
    return FEATURES[name].reason_off(settings)


def start(settings: Settings) -> Callable[[], None]:
    """Start every feature that ``settings`` ask for; call what is returned to stop them, the last one first.

    If one cannot start, those before it are stopped and its error is raised.
    """
    with contextlib.ExitStack() as started:
        for feature in FEATURES.values():
            if feature.start and not feature.reason_off(settings):
                started.callback(feature.start(settings))
        return started.pop_all().close
