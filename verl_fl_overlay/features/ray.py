"""The overlay and its settings in every process that Ray starts, on this node and on others.

A Ray worker has the environment with which its node was started.  From the driver's environment it gets only the
variables that a runtime environment names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from verl_fl_overlay.events import runtime_env
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings.loading import forwarded, kept_back


class Ray(Feature):
    """Adds this process's variables of the stack to what verl gives Ray."""

    def start(self) -> None:
        """Answer which runtime environment Ray is to use."""
        self.undo.callback(runtime_env.answer(with_overlay))

    def describe(self) -> dict[str, Any]:
        """Return the names of the variables that this process gives to Ray's workers, and those that it keeps back."""
        return {"forwarded": sorted(forwarded(os.environ)), "kept back": kept_back(os.environ)}


def with_overlay(given: Mapping[str, Any] | None, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Return the runtime environment ``given`` with the variables to forward added to its ``env_vars``.

    A variable that ``given`` sets itself keeps that value, and one that is set ``elsewhere`` is not added.
    """
    added = {name: text for name, text in forwarded(os.environ).items() if name not in elsewhere}
    own = dict(given or {})
    return {**own, "env_vars": {**added, **(own.get("env_vars") or {})}}
