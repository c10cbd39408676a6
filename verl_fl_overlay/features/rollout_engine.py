"""A rollout engine that is missing or does not fit, told on the driver before Ray starts anything.

verl notices it minutes later, in a worker, and then names another package too.
"""

from __future__ import annotations

import logging
import sys

from verl_fl_overlay import events, packages
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.features.feature import Feature

logger = logging.getLogger("verl_fl_overlay")

WITHOUT = "VERL_FL_DISABLE=rollout.engine goes on without this check"


class RolloutEngine(Feature):
    """Looks at the packages that are here.  What is missing here may be on the nodes of a cluster that Ray joins."""

    def start(self) -> None:
        """Answer whether rollout can use its engine."""
        self.undo.callback(events.rollout_engine.answer(self.check))

    def check(self, engine: str, asked: str, here: bool) -> None:
        """Warn of an engine that may be missing on the nodes, and of versions that do not fit.

        Raises:
            OverlayError: ``engine`` is missing where Ray's processes will run (``here``); or, under VERL_FL_STRICT=1,
                its version there does not fit, or that of a package of the stack.  It may ask for what it is only
                built with, so that all others are warnings.
        """
        from verl_fl_overlay import versions  # in the driver alone

        if packages.has_code(engine):
            found = versions.versions()  # reads hundreds of metadata
            modules = ("torch", "numpy", engine, f"{engine}_fl")
            wrong = [(misfit, True) for misfit in versions.misfits(modules, found, packages.version("verl"))]
            for one in versions.unmet(versions.VERSIONS.get(engine, ()), found):
                if one.here and not one.deep:
                    wrong.append((str(one), one.other in versions.VERSIONS))
            for misfit, of_the_stack in wrong:
                if self.settings.strict and here and of_the_stack:
                    raise OverlayError(f"VERL_FL_STRICT=1, and {asked}: {misfit}. {WITHOUT}")
                logger.warning("%s: %s", asked, misfit)
        elif here:
            hint = f" (verl-fl install-hint {engine})" if engine in versions.VERSIONS else ""
            raise OverlayError(
                f"{asked}, and {engine} is not installed for {sys.executable}, which Ray's processes run too. Install "
                f"it{hint}, or name another engine. {WITHOUT}"
            )
        else:
            logger.warning(
                "%s, and %s is not installed for %s: it has to be on the nodes of the Ray cluster, or in the job's "
                "runtime environment",
                asked,
                engine,
                sys.executable,
            )
