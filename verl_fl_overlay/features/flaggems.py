"""FlagGems' operators in verl's training phase: native before it, native after it."""

from __future__ import annotations

import atexit
import logging
from typing import Any

from verl_fl_overlay import phase
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.flaggems import library
from verl_fl_overlay.flaggems.choice import Selection, select
from verl_fl_overlay.flaggems.counts import CallCounts
from verl_fl_overlay.flaggems.library import FlagGems
from verl_fl_overlay.flaggems.routing import Router
from verl_fl_overlay.settings import Settings

logger = logging.getLogger("verl_fl_overlay")


class Routing(Feature):
    """Routes the chosen operators while the training phase is on, or from its first start on (VERL_FL_SCOPE=process).

    FlagGems is loaded when the phase is entered for the first time: an engine is being initialised then, and its
    worker has chosen its device.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._gems: FlagGems | None = None
        self._selection: Selection | None = None
        self._router: Router | None = None
        self._counts = CallCounts(settings.record) if settings.record else None
        self._fault: Exception | None = None

    def start(self) -> None:
        """Route in the training phase from now on; ``stop`` takes the operators back in either scope."""
        self.undo.callback(self._take_back)
        if self._counts is not None:
            atexit.register(self._counts.write)
            self.undo.callback(atexit.unregister, self._counts.write)
            self.undo.callback(self._counts.write)
        self.undo.callback(phase.training.entered.subscribe(self.entered))
        self.undo.callback(phase.training.left.subscribe(self.left))

    def _take_back(self) -> None:
        if self._router is not None:
            self._router.leave()

    def entered(self) -> None:
        """Put the operators in place.

        Raises:
            FlagGemsError: FlagGems cannot be used here.
            SettingsError: a list does not fit the FlagGems that is here.
        """
        if self._fault is not None:
            raise self._fault.with_traceback(None)  # trying again would cost seconds in every step
        try:
            router = self._router or self._prepare()
        except Exception as error:
            self._fault = error
            raise
        router.enter()

    def left(self) -> None:
        """Take the operators back, unless they stay for the whole process."""
        if self.settings.scope == "phase":
            self._take_back()
        if self._counts is not None:
            self._counts.write_regularly()

    def _prepare(self) -> Router:
        self._gems = library.load()
        self._selection = selection = select(self.settings, self._gems)
        kernels = self._counts.counting(selection.kernels) if self._counts else selection.kernels
        self._router = Router(kernels, self._gems.registrar)
        for note in (*self._gems.notes, *selection.notes):
            logger.warning(note)
        logger.info(
            "FlagGems %s: %d operators in training (%s), %d left out as unsafe",
            self._gems.version,
            len(kernels),
            selection.source,
            len(selection.left_out),
        )
        return self._router

    def describe(self) -> dict[str, Any]:
        """Return what is routed and why, and what is not routed, in JSON's types."""
        scope = "the training phase" if self.settings.scope == "phase" else "the process, from the first engine on"
        if self._gems is None:
            found = library.installed_version() or f"not installed: {library.INSTALL}"
            state = str(self._fault) if self._fault else "not loaded: no engine was initialised in this process"
            return {"version": found, "scope": scope, "state": state}
        told: dict[str, Any] = {"version": self._gems.version, "vendor": self._gems.vendor, "scope": scope}
        if self._selection is None or self._router is None:
            return {**told, "state": str(self._fault)}
        held = self._router.held
        out = held.keys() | self._router.failed.keys()
        routed = [kernel.key for kernel in self._selection.kernels if kernel.key not in out]
        state = "routed now" if self._router.active else "native now"
        return {
            **told,
            "state": f"{state}, but {len(held)} of the chosen operators are held by others" if held else state,
            "operators": len(routed),
            "source": self._selection.source,
            "routed": routed,
            "unsafe": len(self._selection.left_out),
            "left out": dict(self._selection.left_out),
            "failed": dict(self._router.failed),
            "notes": [*self._gems.notes, *self._selection.notes],
            "held by others": dict(held),
            "record": str(self._counts.file) if self._counts else "",
        }
