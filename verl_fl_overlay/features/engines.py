"""The engines that verl built in this process, for the report."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.events import Engine, engine_initialized
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings


class Engines(Feature):
    """Keeps a description of each engine and not the engine itself, so that verl can free it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lines: list[str] = []

    def start(self) -> None:
        """Listen for engines."""
        self.undo.callback(engine_initialized.subscribe(self._initialized))

    def _initialized(self, engine: Engine) -> None:
        models = ", ".join(type(model).__name__ for model in engine.models) or "no model"
        optimizer = "no optimizer" if engine.optimizer is None else type(engine.optimizer).__name__
        self._lines.append(", ".join(filter(None, (f"{engine.backend}: {models}", optimizer, engine.mixed_precision))))

    def describe(self) -> dict[str, Any]:
        """Return the engines in the order they were initialised: backend, models, optimizer, floating type."""
        return {"engines": list(self._lines)}
