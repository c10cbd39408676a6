"""The fused kernels in the models and optimizers that verl trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verl_fl_overlay import events
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.variables import FUSED

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.adam import FusedAdam
    from verl_fl_overlay.kernels.agreement import Agreement
    from verl_fl_overlay.kernels.model import FusedModules

ADAM = "adam"
"""The kind that belongs to the optimizer; the others belong to the model."""


class Fused(Feature):
    """Fuses the models and the optimizer of each engine."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._kinds = FUSED if settings.fused == ("auto",) else settings.fused
        self._made: tuple[Agreement, FusedAdam, FusedModules] | None = None

    def start(self) -> None:
        """Act on the engines that verl builds from now on."""
        self.undo.callback(self._remove)
        self.undo.callback(events.engine_initialized.subscribe(self._fuse))

    def describe(self) -> dict[str, Any]:
        """Return how many modules, functions (rotary) and optimizers there are that may use a kernel, and that do.

        Also what each check found.  A module is found when its engine is built, and replaced when its check agrees.
        """
        if self._made is None:
            return {"found": {}, "replaced": {}, "checks": {}}
        agreement, optimizers, modules = self._made
        return {
            "found": {**optimizers.counts, **modules.counts},
            "replaced": {**optimizers.running, **modules.running},
            "checks": agreement.checks(),
        }

    def _fuse(self, engine: events.Engine) -> None:
        """Fuse an engine that verl has just built.

        Raises:
            ModuleNotFoundError: a kind needs Triton, which is not installed; the optimizer is fused all the same.
        """
        if self._made is None:  # these import torch, which a process that has an engine has imported too
            from verl_fl_overlay.kernels.adam import FusedAdam
            from verl_fl_overlay.kernels.agreement import Agreement
            from verl_fl_overlay.kernels.model import FusedModules

            agreement = Agreement()
            self._made = agreement, FusedAdam(agreement), FusedModules(self._kinds, agreement)
        _, optimizers, modules = self._made
        if ADAM in self._kinds:
            optimizers.fuse(engine.optimizer)
        for model in engine.models:
            modules.fuse(model)

    def _remove(self) -> None:
        if self._made is not None:
            _, optimizers, modules = self._made
            self._made = None
            try:
                optimizers.remove()
            finally:
                modules.remove()
