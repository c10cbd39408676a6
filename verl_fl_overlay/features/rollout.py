"""vllm-plugin-FL in rollout: a list that the user sets extends the chip's own list, and does not replace it."""

from __future__ import annotations

import logging
import os
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch.file import configured, listed
from verl_fl_overlay.events import rollout_plugin_found
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.stack import REPLACED_LISTS

logger = logging.getLogger("verl_fl_overlay")


class Rollout(Feature):
    """Extends the lists in this process's environment each time vLLM finds the plugin."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._added: dict[str, list[str]] = {}
        self._warned = False

    def start(self) -> None:
        """Wait for the plugin.

        Raises:
            OverlayError: VERL_FL_STRICT=1, and the plugin's configuration cannot be read.  It is read here because
                vLLM takes any later error of a plugin for the plugin's absence.
        """
        if self.settings.strict:
            configured(self.settings)
        self.undo.callback(rollout_plugin_found.subscribe(self.extend_lists))

    def extend_lists(self) -> None:
        """Add to the lists in this process's environment what the plugin's configuration leaves out on this chip.

        A user who wants no additions writes the list into the file of VLLM_FL_CONFIG.  Processes that are started from
        here inherit the longer lists.

        Raises:
            OverlayError: the file cannot be read.
        """
        settings, _ = Settings.parse()
        file, content = configured(settings)
        if file is None and not settings["VLLM_FL_CONFIG"]:
            self._warn_of_no_configuration()
        for name, key in REPLACED_LISTS.items():
            missing = [op for op in listed(content, key) if op not in settings[name]]
            if settings[name] and missing:
                os.environ[name] = ",".join((*settings[name], *missing))
                self._added[name] = missing
                logger.info(
                    "%s: added %s from %s, whose list it would have replaced (VERL_FL_DISABLE=rollout.lists keeps "
                    "yours)",
                    name,
                    ", ".join(missing),
                    file,
                )

    def _warn_of_no_configuration(self) -> None:
        """Warn once: vLLM asks the plugin several times."""
        if self._warned:
            return
        self._warned = True
        chip, told_by = chips.find()
        logger.warning(
            "rollout's lists stay as they were set: vllm-plugin-FL has no configuration for %s here (%s), so nothing "
            "of the chip's own is added; if that is not the chip, export GEMS_VENDOR=<its vendor>",
            chip.vendor if chip else "an unknown chip",
            told_by,
        )

    def describe(self) -> dict[str, Any]:
        """Return what was added to which list in this process."""
        return {f"added to {name}": names for name, names in self._added.items()}
