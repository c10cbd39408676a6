"""The features that hooks serve: what each is for, and when the settings leave it out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl_fl_overlay import chips, flagcx, te_fl
from verl_fl_overlay.settings import Settings


@dataclass(frozen=True)
class Feature:
    """A part of the overlay that can be on or off; ``reason_off`` returns "" when the settings ask for it.

    ``start`` subscribes the feature to the events it acts on and returns what takes that back; ``describe`` tells the
    report, in JSON's types, what the feature did.  Both import the feature's module themselves, so that a feature that
    is off costs nothing at load.
    """

    name: str
    summary: str
    reason_off: Callable[[Settings], str] = lambda settings: ""
    start: Callable[[Settings], Callable[[], None]] | None = None
    describe: Callable[[], dict[str, Any]] | None = None


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("phase", "tells when verl trains: engines built, initialised, entered and left"),
        Feature("attention", "padding and value models without the flash-attn package, on any device"),
        Feature("ray", "the overlay and its settings in every process that Ray starts"),
        Feature("flagcx", "collectives of training through FlagCX", flagcx.reason_off, describe=flagcx.describe),
        Feature("chip", "chips that verl has no platform for", chips.reason_off, describe=chips.describe),
        Feature(
            "te_fl",
            "the policies of TransformerEngine-FL and Megatron-LM-FL",
            te_fl.reason_off,
            start=te_fl.start,
            describe=te_fl.describe,
        ),
        Feature(
            "cpu",
            "training on a machine without an accelerator",
            lambda settings: "" if settings.device == "cpu" else "VERL_FL_DEVICE is not cpu",
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
