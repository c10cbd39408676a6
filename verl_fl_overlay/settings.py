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


def file(text: str) -> str:
    """Read the path of a file, which need not exist."""
    read = path(text)
    if read and (os.path.isdir(read) or read.endswith(os.sep)):
        raise MalformedError("a file, and this is a directory")
    return read


def listed(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; blank means that there is none, and commas alone are no list."""
    read = names(text)
    if text.strip() and not read:
        raise MalformedError("names, comma-separated; there is none between the commas")
    return read


KEYWORDS = ("auto", "all", "none")


def operators(text: str) -> tuple[str, ...]:
    """Read auto, all or none (a tuple of that one word), or a list of operators."""
    read = listed(text) or ("auto",)
    if len(read) == 1 and read[0].lower() in KEYWORDS:
        return (read[0].lower(),)
    mixed = [name for name in read if name.lower() in KEYWORDS]
    if mixed:
        raise MalformedError(f"{mixed[0]} alone, or names without it")
    return read


def profile(text: str) -> str:
    """Read auto, 0 or none (the empty string), or a file's path."""
    lowered = text.strip().lower()
    if lowered in ("", "auto"):
        return "auto"
    return "" if lowered in ("0", "none") else file(text)


FUSED = ("rms_norm", "gated_mlp", "rotary")
"""Kinds of modules that have a fused kernel."""


def fused(text: str) -> tuple[str, ...]:
    """Read auto or 1 (a tuple of the word auto), 0 or none (nothing), or a list of kinds."""
    read = tuple(name.lower() for name in names(text)) or ("auto",)
    if read in (("auto",), ("1",)):
        return ("auto",)
    if read in (("0",), ("none",)):
        return ()
    if not set(read) <= set(FUSED):
        raise MalformedError(f"auto, 0, or some of {', '.join(FUSED)}, comma-separated")
    return read


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
    "use_flaggems": Variable(
        "USE_FLAGGEMS",
        flag,
        False,
        "1 or 0",
        "Compute with FlagGems' operators; in training unless TRAINING_FL_FLAGGEMS_ENABLE says otherwise.",
    ),
    "training_flaggems": Variable(
        "TRAINING_FL_FLAGGEMS_ENABLE",
        flag,
        None,
        "1 or 0",
        "Decides for training, whatever USE_FLAGGEMS says.",
    ),
    "flagos_whitelist": Variable(
        "TRAINING_FL_FLAGOS_WHITELIST",
        listed,
        (),
        "names of FlagGems functions, comma-separated",
        "Route these operators in training and no others.",
    ),
    "flagos_blacklist": Variable(
        "TRAINING_FL_FLAGOS_BLACKLIST",
        listed,
        (),
        "names of FlagGems functions, comma-separated",
        "Route all operators in training but these.",
    ),
    "ops": Variable(
        "VERL_FL_OPS",
        operators,
        ("auto",),
        "auto, all, none, or names of FlagGems functions, comma-separated",
        "Which operators training routes to FlagGems.",
    ),
    "unsafe_ops": Variable(
        "VERL_FL_UNSAFE_OPS",
        listed,
        (),
        "aten keys such as where.ScalarOther, comma-separated",
        "Route these although FlagGems' kernel cuts or falsifies a gradient.",
    ),
    "scope": Variable(
        "VERL_FL_SCOPE",
        choice("phase", "process"),
        "phase",
        "phase or process",
        "phase: route while verl trains and be native between; process: from the first engine on, for good.",
    ),
    "fused": Variable(
        "VERL_FL_FUSED",
        fused,
        ("auto",),
        f"auto, 0, or some of {', '.join(FUSED)}",
        "Which modules of a model run on fused kernels; auto: all of them, where FlagGems is installed.",
    ),
    "profile": Variable(
        "VERL_FL_PROFILE",
        profile,
        "auto",
        "auto, 0, or a file made by verl-fl tune",
        "Which measured choice of operators to route; auto: the one shipped for this chip and these versions.",
    ),
    "record": Variable(
        "TRAINING_FLAGGEMS_PATH",
        file,
        "",
        "a file; every process puts its rank and number into the name",
        "Count the calls of FlagGems' operators in training and write them there.",
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
    use_flaggems: bool = False
    training_flaggems: bool | None = None
    flagos_whitelist: tuple[str, ...] = ()
    flagos_blacklist: tuple[str, ...] = ()
    ops: tuple[str, ...] = ("auto",)
    unsafe_ops: tuple[str, ...] = ()
    scope: str = "phase"
    fused: tuple[str, ...] = ("auto",)
    profile: str = "auto"
    record: str = ""
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
        settings = cls(**values, given=given)
        problems += settings.contradictions()
        if problems:
            raise SettingsError("verl-fl-overlay cannot use these settings:\n" + "\n".join(f"  {p}" for p in problems))
        return settings

    def contradictions(self) -> list[str]:
        """Return, in words, which settings cannot be meant together."""
        lists = [
            f"{VARIABLES[attribute].name}={','.join(getattr(self, attribute))}"
            for attribute in ("flagos_whitelist", "flagos_blacklist", "ops")
            if getattr(self, attribute)
            and not (attribute == "ops" and (self.ops == ("auto",) or (self.ops == ("all",) and self.flagos_blacklist)))
        ]
        return [f"{' and '.join(lists)} contradict each other: allowed is one of them"] if len(lists) > 1 else []


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
