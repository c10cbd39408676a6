"""What every feature is: an object that is made from the settings, started, described and stopped."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from verl_fl_overlay.settings import Settings


class Feature:
    """A part of the overlay while it is on.  All that it knows is in the object, so nothing is left when it is gone.

    ``start`` subscribes to events and answers questions (``verl_fl_overlay.events``).  It gives what takes each of
    these back to ``undo.callback``.  ``describe`` is asked for the report and returns JSON's types.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.undo = ExitStack()

    def start(self) -> None:
        """Begin to act; what was begun is taken back by ``stop``, also where this raises halfway."""

    def stop(self) -> None:
        """Take back all that was begun, the last first; doing it again changes nothing."""
        self.undo.close()

    def describe(self) -> dict[str, Any]:
        """Return what the feature did and found in this process."""
        return {}
