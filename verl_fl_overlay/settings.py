"""The environment, parsed once into a frozen ``Settings``: the overlay's own variables, and those of the whole stack.

All problems are collected and raised together, each with the variable, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.stack import PREFIXES, STACK
from verl_fl_overlay.variables import MalformedError, Variable, choice, flag, names, path

OWN_PREFIX = "VERL_FL_"


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
        "Every process with the overlay writes <host>-<pid>.json there.",
    ),
}
"""Field of ``Settings`` -> the overlay's own variable that it comes from; the stack's are in ``stack.STACK``."""


def every_variable() -> dict[str, Variable[Any]]:
    """Return name -> variable for the whole table, the overlay's own first."""
    return {**{variable.name: variable for variable in VARIABLES.values()}, **STACK}


@dataclass(frozen=True)
class Settings:
    """The parsed environment.

    The overlay's own variables are attributes.  Every variable of the table, own or the stack's, is there by its name:
    ``settings["USE_FLAGCX"]`` is the parsed value, or the default where it was not set.  ``given`` holds the raw text
    of the variables that were set.
    """

    disable: tuple[str, ...] = ()
    strict: bool = False
    device: str = "auto"
    report_dir: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    parsed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Parse ``environment`` (the process's own by default).

        Raises:
            SettingsError: values that are not allowed, or that contradict each other; its text lists every problem.
        """
        from verl_fl_overlay.conflicts import contradictions

        settings, problems = cls.parse(environment)
        problems += contradictions(settings)
        if problems:
            raise SettingsError("verl-fl-overlay cannot use these settings:\n" + "\n".join(f"  {p}" for p in problems))
        return settings

    @classmethod
    def parse(cls, environment: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
        """Parse what can be parsed, and say of each other variable what is allowed; those keep their defaults."""
        environment = os.environ if environment is None else environment
        parsed: dict[str, Any] = {}
        given: dict[str, str] = {}
        problems: list[str] = []
        for variable in every_variable().values():
            text = environment.get(variable.name)
            if text is None:
                continue
            given[variable.name] = text
            try:
                parsed[variable.name] = variable.read(text)
            except MalformedError as error:
                problems.append(f"{variable.name}={shown(variable.name, text)!r}: allowed is {error}{_quoted(text)}")
        own = {attribute: parsed[v.name] for attribute, v in VARIABLES.items() if v.name in parsed}
        return cls(**own, given=given, parsed=parsed), problems

    def __getitem__(self, name: str) -> Any:
        """Return the value of a variable by its name.

        Raises:
            KeyError: the table has no variable of that name.
        """
        variable = every_variable()[name]
        return self.parsed.get(name, variable.default)


def _quoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return "; the quotes are part of the value, take them away" if quoted else ""


LONGEST_SHOWN = 200
"""Characters of a value that are shown; the rest is only counted."""


def shown(name: str, text: str) -> str:
    """Return the value of variable ``name`` as it may be printed: a URL without its user and password, and not long."""
    if "://" in text:
        scheme, _, rest = text.partition("://")
        text = f"{scheme}://***@{rest.rpartition('@')[2]}" if "@" in rest else text
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def misspelt(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a warning, with the nearest real name, for every variable that only looks like one of the table's."""
    environment = os.environ if environment is None else environment
    known = every_variable()
    warnings = []
    for name in sorted(environment):
        if name in known:
            continue
        if name.startswith("ROLLOUT_FL_"):
            warnings.append(f"{name} is read by nothing; rollout reads {name.replace('ROLLOUT_FL_', 'VLLM_FL_')}")
        elif name.startswith((OWN_PREFIX, *PREFIXES)):
            near = difflib.get_close_matches(name, known, n=1)
            whose = (
                "is not a variable of verl-fl-overlay"
                if name.startswith(OWN_PREFIX)
                else "is no variable of the FlagOS stack that verl-fl-overlay knows, and is not given to Ray's workers"
            )
            warnings.append(f"{name} {whose}" + (f"; {near[0]}?" if near else ""))
    return warnings
