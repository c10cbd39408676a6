"""Every environment variable the overlay reads, as one table, parsed once into a frozen ``Settings``.

All problems are collected and raised together, each with the variable, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from verl_fl_overlay.errors import SettingsError

T = TypeVar("T")

OWN_PREFIX = "VERL_FL_"


class MalformedError(ValueError):
    """A value that its variable does not allow; the text says what is allowed."""


def flag(text: str) -> bool:
    """Read 1/true/yes/on or 0/false/no/off, in any case."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off", ""}:
        return False
    raise MalformedError("one of 1, true, yes, on, 0, false, no, off")


def names(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; blanks around names, empty items and repetitions are dropped, the order is kept."""
    return tuple(dict.fromkeys(item for part in text.split(",") if (item := part.strip())))


def choice(*allowed: str) -> Callable[[str], str]:
    """Read one of ``allowed``, in any case."""

    def read(text: str) -> str:
        lowered = text.strip().lower()
        if lowered not in allowed:
            raise MalformedError("one of " + ", ".join(repr(a) for a in allowed))
        return lowered

    return read


def path(text: str) -> str:
    """Read a file system path; ``~`` is expanded."""
    return os.path.expanduser(text.strip())


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable: ``read`` turns its text into the value, or raises ``MalformedError``."""

    name: str
    read: Callable[[str], T]
    default: T
    allowed: str
    help: str


VARIABLES: dict[str, Variable[Any]] = {
    "disable": Variable(
        "VERL_FL_DISABLE",
        names,
        (),
        "hook names, comma-separated, or *",
        "Hooks to leave out, by the names that doctor prints; * leaves out all of them.",
    ),
    "strict": Variable(
        "VERL_FL_STRICT",
        flag,
        False,
        "1 or 0",
        "Raise where the overlay would otherwise warn once and go on natively.",
    ),
    "device": Variable(
        "VERL_FL_DEVICE",
        choice("auto", "cpu"),
        "auto",
        "auto or cpu",
        "cpu: train on a machine without an accelerator; auto: whatever verl finds.",
    ),
    "report_dir": Variable(
        "VERL_FL_REPORT_DIR",
        path,
        "",
        "a directory, made if it is not there",
        "Every process with the overlay writes `<host>-<pid>.json` there.",
    ),
}
"""Field of ``Settings`` -> the variable it comes from."""


@dataclass(frozen=True)
class Settings:
    """The parsed environment; ``given`` holds the raw text of the variables that were set."""

    disable: tuple[str, ...] = ()
    strict: bool = False
    device: str = "auto"
    report_dir: str = ""
    given: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Parse ``environment`` (the process's own by default).

        Raises:
            SettingsError: at least one value is not allowed; its text lists every problem.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        given: dict[str, str] = {}
        problems: list[str] = []
        for attribute, variable in VARIABLES.items():
            text = environment.get(variable.name)
            if text is None:
                continue
            given[variable.name] = text
            try:
                values[attribute] = variable.read(text)
            except MalformedError as error:
                problems.append(f"{variable.name}={text!r}: allowed is {error}")
        if problems:
            raise SettingsError("verl-fl-overlay cannot use these settings:\n" + "\n".join(f"  {p}" for p in problems))
        return cls(**values, given=given)


def misspelt(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a warning, with the nearest real name, for every variable that only looks like one of the overlay's."""
    environment = os.environ if environment is None else environment
    known = [variable.name for variable in VARIABLES.values()]
    warnings = []
    for name in sorted(environment):
        if name.startswith(OWN_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            warnings.append(f"{name} is not a variable of verl-fl-overlay" + (f"; {near[0]}?" if near else ""))
    return warnings
