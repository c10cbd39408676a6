"""Tells verl which chip it trains on, if verl has no platform for that chip; the CPU is such a chip."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.devices import chips
from verl_fl_overlay.features.feature import Feature


class UnknownChip(Feature):
    """Chooses the chip once: the search reads the file system, and verl asks for its device in every step."""

    def start(self) -> None:
        """Answer which chip this is and what its collectives are called."""
        chip = chips.without_platform(self.settings)
        if chip is not None:
            self.undo.callback(events.chip.answer(lambda: chip))
            self.undo.callback(events.chip_backend.answer(partial(self._collectives, chip)))

    @staticmethod
    def _collectives(chip: chips.Chip, found: str) -> str:
        return found if found == chips.FLAGCX else chips.backend(chip)

    def describe(self) -> dict[str, Any]:
        """Return the chip's row, and how the chip was detected."""
        chip, told_by = chips.chosen(self.settings)
        return {"told by": told_by, **({} if chip is None else asdict(chip))}
