"""FlagGems that others import or enable: its own tuning database, and told when it is in training."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from verl_fl_overlay import phase
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.events import failures
from verl_fl_overlay.features.feature import Feature

if TYPE_CHECKING:
    from verl_fl_overlay.flaggems.others import Others


def _own_database(flag_gems: ModuleType) -> None:
    from verl_fl_overlay.flaggems import database

    database.give_each_process_its_own()


class Enablers(Feature):
    """Looks when the training phase is entered and left, so an enabling before, inside and between phases is seen."""

    _others: Others | None = None

    def start(self) -> None:
        """Watch the phase, and give FlagGems a database of this process's own when it is imported."""
        wrapt.when_imported("flag_gems")(_own_database)
        self.undo.callback(phase.training.entered.subscribe(self.entered))
        self.undo.callback(phase.training.left.subscribe(self.left))

    def entered(self) -> None:
        """Tell of what others hold.

        Raises:
            OverlayError: VERL_FL_STRICT=1, and others hold something.
        """
        others, changed = self._look(training=True)
        if others is not None and others.held and (changed or self.settings.strict):
            self._tell(others)

    def left(self) -> None:
        """Tell of what others hold now and did not hold when the phase was entered.

        Raises:
            OverlayError: VERL_FL_STRICT=1, and others hold something new.
        """
        others, changed = self._look(training=False)
        if others is not None and others.held and changed:
            self._tell(others)

    def _look(self, training: bool) -> tuple[Others | None, bool]:
        if "flag_gems" not in sys.modules:
            return None, False
        if self._others is None:
            from verl_fl_overlay.flaggems.others import Others

            self._others = Others(self.settings.unsafe_ops)
        return self._others, self._others.look(training)

    def _tell(self, others: Others) -> None:
        count = f"{len(others.held)} operators of others' FlagGems ({len(others.harmful)} harmful)"
        failures.record(f"keeping {count} out of training", OverlayError(str(others)))

    def describe(self) -> dict[str, Any]:
        """Return what FlagGems' kernels of others hold as of the last look, by aten key."""
        others = self._others
        if others is None or not others.held:
            return {"state": "nobody but the overlay has enabled FlagGems"}
        return {"state": str(others), "held": dict(others.held), "harmful": dict(others.harmful)}
