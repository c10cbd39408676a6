"""The plugins for rollout: a list that the user sets extends the chip's own list, and does not replace it."""

from __future__ import annotations

import logging
import os
from typing import Any

from verl_fl_overlay.devices import chips
from verl_fl_overlay.dispatch.file import configured
from verl_fl_overlay.events import rollout_plugin_found
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.plugins import PLUGINS, Plugin

logger = logging.getLogger("verl_fl_overlay")


class Rollout(Feature):
    """Extends the lists in this process's environment each time an engine finds its plugin."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._added: dict[str, list[str]] = {}
        self._warned: set[str] = set()

    def start(self) -> None:
        """Wait for the plugins.

        Raises:
            OverlayError: VERL_FL_STRICT=1, and a plugin's configuration cannot be read.  It is read here because an
                engine takes any later error of a plugin for the plugin's absence.
        """
        for plugin in PLUGINS if self.settings.strict else ():
            if any(self.settings[name] for name in plugin.lists):
                configured(plugin, self.settings)
        self.undo.callback(rollout_plugin_found.subscribe(self.extend_lists))

    def extend_lists(self, package: str) -> None:
        """Add to the lists in this process's environment what a plugin's configuration leaves out on this chip.

        A user who wants no additions writes the list into the plugin's file, where this version reads lists there.
        Processes that are started from here inherit the longer lists.

        Raises:
            OverlayError: the file cannot be read.
        """
        plugin = next(plugin for plugin in PLUGINS if plugin.package == package)
        settings, _ = Settings.parse()
        given = {name: settings[name] for name in plugin.lists if settings[name]}
        if not given:
            return
        files, lists = configured(plugin, settings)
        if not files and not settings[plugin.config]:
            self._warn_of_no_configuration(plugin)
        for name, mine in given.items():
            missing = [op for op in lists[plugin.lists[name]] if op not in mine]
            if missing:
                os.environ[name] = ",".join((*mine, *missing))
                self._added[name] = missing
                logger.info(
                    "%s: added %s from %s, whose list it would have replaced (VERL_FL_DISABLE=%s keeps yours)",
                    name,
                    ", ".join(missing),
                    " and ".join(map(str, files)),
                    plugin.hooks[0],
                )

    def _warn_of_no_configuration(self, plugin: Plugin) -> None:
        """Warn once: an engine asks its plugin several times."""
        if plugin.name in self._warned:
            return
        self._warned.add(plugin.name)
        chip, told_by = chips.find()
        logger.warning(
            "rollout's lists stay as they were set: %s has no configuration for %s here (%s), so nothing of the chip's "
            "own is added; if that is not the chip, export GEMS_VENDOR=<its vendor>",
            plugin.name,
            chip.vendor if chip else "an unknown chip",
            told_by,
        )

    def describe(self) -> dict[str, Any]:
        """Return what was added to which list in this process."""
        return {f"added to {name}": names for name, names in self._added.items()}
