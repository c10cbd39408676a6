"""Which operators training routes to FlagGems, and which setting or profile decided that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.flaggems import names, profile, safety
from verl_fl_overlay.flaggems.library import FlagGems, Kernel
from verl_fl_overlay.settings import Settings


@dataclass(frozen=True)
class Choice:
    """Function names of FlagGems, and where they come from (a variable's name, a profile, the default)."""

    names: tuple[str, ...]
    source: str
    may_be_empty: bool = False
    """Whether an empty choice is valid, and not a mistake."""
    notes: tuple[str, ...] = ()
    """What a list names in vain, though it does no harm."""


@dataclass(frozen=True)
class Selection:
    """The kernels to route, where the choice came from, and what it named but training must not use, with reasons."""

    kernels: tuple[Kernel, ...]
    source: str
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Source = Callable[[Settings, FlagGems], Choice | None]
"""Returns the functions to route, None if this source does not decide."""


def by_list(settings: Settings, gems: FlagGems) -> Choice | None:
    """Return what the user's environment names, checked against the installed FlagGems."""
    if settings.flagos_whitelist:
        names.check(settings.flagos_whitelist, "TRAINING_FL_FLAGOS_WHITELIST", gems)
        return Choice(settings.flagos_whitelist, "TRAINING_FL_FLAGOS_WHITELIST")
    if settings.flagos_blacklist:
        rest = tuple(name for name in gems.names if name not in settings.flagos_blacklist)
        unknown = names.unknown_in(settings.flagos_blacklist, gems)  # to exclude what is not there does no harm
        notes = tuple(f"TRAINING_FL_FLAGOS_BLACKLIST excludes nothing by {text}" for text in unknown)
        return Choice(rest, "TRAINING_FL_FLAGOS_BLACKLIST", notes=notes)
    if settings.ops == ("all",):
        return Choice(gems.names, "VERL_FL_OPS=all")
    if settings.ops != ("auto",):
        names.check(settings.ops, "VERL_FL_OPS", gems)
        return Choice(settings.ops, "VERL_FL_OPS")
    return None


def by_profile(settings: Settings, gems: FlagGems) -> Choice | None:
    """Return what was measured to be faster here, by the user's profile or by one shipped for this chip."""
    found = profile.find(settings.profile)
    if found is None:
        return None
    names.check(found[0].chosen, found[1], gems)
    return Choice(found[0].chosen, found[1], may_be_empty=True)


def everything(settings: Settings, gems: FlagGems) -> Choice:
    """Return all that FlagGems has."""
    return Choice(gems.names, "default: all that is safe in training")


SOURCES: list[Source] = [by_list, by_profile, everything]
"""Asked in this order; the first that returns a choice decides."""


def select(settings: Settings, gems: FlagGems) -> Selection:
    """Return the kernels to route: the chosen ones, except those that would harm a gradient.

    VERL_FL_UNSAFE_OPS lets single aten keys through.

    Raises:
        SettingsError: a list of what to route names what FlagGems does not have, or nothing is left of it.
    """
    choice = next(found for source in SOURCES if (found := source(settings, gems)) is not None)
    allowed = names.check_keys(settings.unsafe_ops, "VERL_FL_UNSAFE_OPS", gems)
    kernels, left_out = [], {}
    for kernel in gems.kernels:
        if kernel.name not in choice.names:
            continue
        reason = safety.why_unsafe(kernel)
        if not reason:
            kernels.append(safety.seen_by_autograd(kernel))
        elif kernel.key in allowed:
            kernels.append(kernel)
        else:
            left_out[kernel.key] = reason
    if not kernels and not choice.may_be_empty:
        raise SettingsError(
            f"{choice.source} leaves no operator to route to FlagGems {gems.version}.\n"
            + "".join(f"  {key}: {reason}\n" for key, reason in left_out.items())
            + "  VERL_FL_UNSAFE_OPS lets an unsafe aten key through; VERL_FL_OPS=none switches routing off."
        )
    return Selection(tuple(kernels), choice.source, left_out, choice.notes)
