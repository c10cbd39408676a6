"""What makes verl load the overlay, and which variables another process of the same run is given."""

from __future__ import annotations

from collections.abc import Mapping

from verl_fl_overlay.settings.stack import OF_ONE_PROCESS
from verl_fl_overlay.settings.table import Settings, shown
from verl_fl_overlay.settings.variables import names

LOADED_BY = "VERL_USE_EXTERNAL_MODULES"
"""The modules that verl imports when it is imported."""

OVERLAY = "verl_fl_overlay"


def modules(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the modules that ``LOADED_BY`` names."""
    return names(environment.get(LOADED_BY, ""))


def with_overlay(environment: Mapping[str, str]) -> str:
    """Return ``LOADED_BY`` with the overlay in it; the overlay is added at the end if it was not named."""
    listed = modules(environment)
    return ",".join(listed if OVERLAY in listed else (*listed, OVERLAY))


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that another process of the same run needs.

    These are the table's variables that are set, all other FLAGCX_* (FlagCX reads dozens more than the table has), and
    ``LOADED_BY`` with the overlay in it.  Variables that tell one node or rank from another are not among them, and
    neither are values that carry a password.
    """
    settings, _ = Settings.parse(environment)
    flagcx = {n: text for n, text in environment.items() if n.startswith("FLAGCX_") and n not in OF_ONE_PROCESS}
    given = {name: text for name, text in {**settings.given, **flagcx}.items() if "://***@" not in shown(name, text)}
    return {**given, LOADED_BY: with_overlay(given)}
