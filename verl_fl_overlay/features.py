"""The features that hooks serve: what each is for, and when the settings leave it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl_fl_overlay.settings import Settings


@dataclass(frozen=True)
class Feature:
    """A part of the overlay that can be on or off; ``reason_off`` returns "" when the settings ask for it."""

    name: str
    summary: str
    reason_off: Callable[[Settings], str] = lambda settings: ""


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("phase", "tells when verl trains: engines built, initialised, entered and left"),
        Feature("attention", "padding and value models without the flash-attn package, on any device"),
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
