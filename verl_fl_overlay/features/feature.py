"""What every feature is: an object that is made from the settings, started, described and stopped."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from verl_fl_overlay.settings import Settings


class Feature:
    """A part of the overlay while it is on.  All that it knows is in the object, so nothing is left when it is gone.

    ``start`` subscribes to events and answers questions (``verl_fl_overlay.events``).  It passes the function that ends
    each of these to ``undo.callback``.  ``describe`` is called for the report and returns JSON's types.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.undo = ExitStack()

    def start(self) -> None:
        """Begin to act.  ``stop`` undoes what was begun, also if this method raises halfway."""

    def stop(self) -> None:
        """Undo all that was begun, the last first; a second call changes nothing."""
        self.undo.close()

    def describe(self) -> dict[str, Any]:
        """Return what the feature did and found in this process."""
        return {}

    def rehearse(self) -> None:
        """Do once, on small data, what ``describe`` cannot tell of before verl trains.  ``doctor`` calls this."""
