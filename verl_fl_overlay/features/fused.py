"""Fused kernels."""

from __future__ import annotations

import sys
from typing import Any

from verl_fl_overlay.events import engine_initialized
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.kernels.fused import FusedModules
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.variables import FUSED


class Fused(Feature):
    """Fused."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.modules = FusedModules(FUSED if settings.fused == ("auto",) else settings.fused)

    def start(self) -> None:
        """Start."""
        self.undo.callback(self.modules.remove)
        self.undo.callback(engine_initialized.subscribe(self.modules.engine_initialized))

    def describe(self) -> dict[str, Any]:
        """Describe."""
        check = sys.modules.get("verl_fl_overlay.kernels.agreement")
        return {"replaced": dict(self.modules.counts), "checks": check.checks() if check else {}}
