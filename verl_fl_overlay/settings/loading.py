"""What makes verl load the overlay, and which variables another process of the same run is given."""

from __future__ import annotations

from collections.abc import Mapping

from verl_fl_overlay.settings.stack import OF_ONE_PROCESS, PREFIXES
from verl_fl_overlay.settings.table import TABLE, Settings, secret
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

    These are all of the stack that are set, less what ``kept_back`` names, and ``LOADED_BY`` with the overlay in it.
    """
    given = _of_the_stack(environment)
    kept = _kept_of(given)
    return {**{name: text for name, text in given.items() if name not in kept}, LOADED_BY: with_overlay(given)}


def kept_back(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the stack that are set and that no other process is given, each with the reason."""
    return _kept_of(_of_the_stack(environment))


def _kept_of(given: Mapping[str, str]) -> dict[str, str]:
    secrets = {name: "it holds a password, a token or a key" for name, text in given.items() if secret(name, text)}
    return {**secrets, **{name: "it differs between processes" for name in OF_ONE_PROCESS if name in given}}


def _of_the_stack(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the table's variables that are set, and those that the components read beside them."""
    settings, _ = Settings.parse(environment)
    others = {name: text for name, text in environment.items() if name.startswith(PREFIXES) and name not in TABLE}
    return {**settings.given, **others}
