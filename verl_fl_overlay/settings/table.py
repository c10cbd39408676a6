"""The environment, parsed once into a frozen ``Settings``: the overlay's own variables, and those of the whole stack.

All problems are collected and raised together, each with the variable, its value and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_fl_overlay.errors import SettingsError, nearest
from verl_fl_overlay.settings.stack import PREFIXES, STACK
from verl_fl_overlay.settings.variables import (
    FUSED,
    BlankError,
    MalformedError,
    Variable,
    choice,
    file,
    flag,
    fused,
    listed,
    names,
    operators,
    path,
    profile,
    recompute,
)

OWN_PREFIX = "VERL_FL_"

EXCLUSIVE = (
    ("TRAINING_FL_FLAGOS_WHITELIST", "TRAINING_FL_FLAGOS_BLACKLIST"),
    ("VLLM_FL_FLAGOS_WHITELIST", "VLLM_FL_FLAGOS_BLACKLIST"),
    ("VLLM_FL_OOT_WHITELIST", "VLLM_FL_OOT_BLACKLIST"),
    ("SGLANG_FL_FLAGOS_WHITELIST", "SGLANG_FL_FLAGOS_BLACKLIST"),
    ("SGLANG_FL_OOT_WHITELIST", "SGLANG_FL_OOT_BLACKLIST"),
)
"""Pairs of lists; only one list of a pair may be set."""


@dataclass(frozen=True)
class Settings:
    """The parsed environment, and the table of the variables that the overlay acts on: a row is a class attribute.

    A variable that the overlay acts on is an attribute.  Every variable, also of other components, can be read by name:
    ``settings["USE_FLAGCX"]`` is the parsed value, or the default if it was not set.  ``given`` holds the raw text
    of the variables that were set, ``parsed`` their values.
    """

    disable = Variable[tuple[str, ...]](
        "VERL_FL_DISABLE",
        names,
        (),
        "hook names, comma-separated, or *",
        "Hooks to leave out, by the names that doctor prints; * leaves out all of them.",
    )
    strict = Variable(
        "VERL_FL_STRICT",
        flag,
        False,
        "1 or 0",
        "Raise where the overlay would otherwise warn once and go on natively.",
    )
    device = Variable(
        "VERL_FL_DEVICE",
        choice("auto", "cpu"),
        "auto",
        "auto or cpu",
        "cpu: train on a machine without an accelerator; auto: whatever verl finds.",
    )
    report_dir = Variable(
        "VERL_FL_REPORT_DIR",
        path,
        "",
        "a directory, made if it is not there",
        "Every process with the overlay writes `<host>-<pid>.json` there.",
    )
    use_flaggems = Variable[bool | None](
        "USE_FLAGGEMS",
        flag,
        None,
        "1 or 0",
        "Compute with FlagGems' operators: in training where it is 1, in rollout unless it is 0.",
        "vllm-plugin-FL",
        truths=("1", "true"),
    )
    training_flaggems = Variable[bool | None](
        "TRAINING_FL_FLAGGEMS_ENABLE",
        flag,
        None,
        "1 or 0",
        "Decides for training, whatever USE_FLAGGEMS says.",
        phase="training",
    )
    flagos_whitelist = Variable[tuple[str, ...]](
        "TRAINING_FL_FLAGOS_WHITELIST",
        listed,
        (),
        "names of FlagGems functions, comma-separated",
        "Route these operators in training and no others.",
        phase="training",
    )
    flagos_blacklist = Variable[tuple[str, ...]](
        "TRAINING_FL_FLAGOS_BLACKLIST",
        listed,
        (),
        "names of FlagGems functions, comma-separated",
        "Route all operators in training but these.",
        phase="training",
    )
    ops = Variable[tuple[str, ...]](
        "VERL_FL_OPS",
        operators,
        ("auto",),
        "auto, all, none, or names of FlagGems functions, comma-separated",
        "Which operators training routes to FlagGems.",
        phase="training",
    )
    unsafe_ops = Variable[tuple[str, ...]](
        "VERL_FL_UNSAFE_OPS",
        listed,
        (),
        "aten keys such as where.ScalarOther, comma-separated",
        "Route these although FlagGems' kernel cuts or falsifies a gradient.",
        phase="training",
    )
    scope = Variable(
        "VERL_FL_SCOPE",
        choice("phase", "process"),
        "phase",
        "phase or process",
        "phase: route while verl trains and be native between; process: from the first engine on, for good.",
        phase="training",
    )
    fused = Variable[tuple[str, ...]](
        "VERL_FL_FUSED",
        fused,
        ("auto",),
        f"auto, 0, or some of {', '.join(FUSED)}",
        "What of a model and its optimizer runs on fused kernels; auto: all of it, where Triton is installed.",
        phase="training",
    )
    head = Variable(
        "VERL_FL_HEAD",
        choice("auto", "logits", "chunked"),
        "auto",
        "auto, logits or chunked",
        "chunked: log-probs and entropy a part of the logits at a time; auto: where all of them would not fit.",
        phase="training",
    )
    profile = Variable(
        "VERL_FL_PROFILE",
        profile,
        "auto",
        "auto, 0, or a file made by verl-fl tune",
        "Which measured choice of operators to route; auto: the one shipped for this chip and these versions.",
        phase="training",
    )
    recompute = Variable[str | int](
        "VERL_FL_RECOMPUTE",
        recompute,
        "all",
        "all, none, auto, or a number",
        "How many layers recompute their activations where gradient checkpointing is on: the first N of a model; auto: "
        "as few as the memory needs.",
        phase="training",
    )
    record = Variable(
        "TRAINING_FLAGGEMS_PATH",
        file,
        "",
        "a file; every process puts its rank and number into the name",
        "Count the calls of FlagGems' operators in training and write them there.",
        phase="training",
    )

    given: Mapping[str, str] = field(default_factory=dict)
    parsed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Return settings with these values of the overlay's own variables, by attribute: ``of(device="cpu")``."""
        return cls(parsed={VARIABLES[attribute].name: value for attribute, value in values.items()})

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Parse ``environment`` (the process's own by default).

        Raises:
            SettingsError: values that are not allowed, or that contradict each other; its text lists every problem.
        """
        settings, problems = cls.parse(environment)
        problems += contradictions(settings)
        if problems:
            raise SettingsError("verl-fl-overlay cannot use these settings:\n" + "\n".join(f"  {p}" for p in problems))
        return settings

    @classmethod
    def parse(cls, environment: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
        """Parse what can be parsed; return what is allowed for each other variable, and keep its default."""
        environment = os.environ if environment is None else environment
        parsed: dict[str, Any] = {}
        given: dict[str, str] = {}
        problems: list[str] = []
        for name, variable in TABLE.items():
            text = environment.get(name)
            if text is None:
                continue
            given[name] = text
            try:
                parsed[name] = variable.read(text)
            except BlankError:
                del given[name]
            except MalformedError as error:
                problems.append(f"{name}={shown(name, text)!r}: allowed is {error}{_quoted(text)}")
        return cls(given, parsed), problems

    def __getitem__(self, name: str) -> Any:
        """Return the value of a variable by its name.

        Raises:
            KeyError: the table has no variable of that name.
        """
        return self.parsed.get(name, TABLE[name].default)

    @property
    def flaggems_in_training(self) -> bool:
        """Whether training uses FlagGems: TRAINING_FL_FLAGGEMS_ENABLE decides, else USE_FLAGGEMS."""
        return bool(self.use_flaggems if self.training_flaggems is None else self.training_flaggems)


VARIABLES: dict[str, Variable[Any]] = {
    attribute: row for attribute, row in vars(Settings).items() if isinstance(row, Variable)
}
"""Attribute of ``Settings`` -> its variable: those that the overlay acts on."""

TABLE: dict[str, Variable[Any]] = {**{row.name: row for row in VARIABLES.values()}, **STACK}
"""Name -> variable, for the whole stack, the overlay's own first."""


def of_phase(phase: str) -> list[Variable[Any]]:
    """Return the variables that are read in ``phase`` or in all phases; every one for ""."""
    return [variable for variable in TABLE.values() if not phase or variable.phase in (phase, "common")]


def contradictions(settings: Settings) -> list[str]:
    """Return the contradictions between variables, in words."""
    lists = [
        f"{white} and {black} are both set: one list says what is used and the other what is not; keep one of them"
        for white, black in EXCLUSIVE
        if settings[white] and settings[black]
    ]
    return [*lists, *_operator_choices(settings)]


def _operator_choices(settings: Settings) -> Iterator[str]:
    white, black = EXCLUSIVE[0]
    if settings.ops == ("auto",):
        return
    if settings.flagos_whitelist or (settings.flagos_blacklist and settings.ops != ("all",)):
        other = white if settings.flagos_whitelist else black
        yield f"VERL_FL_OPS={','.join(settings.ops)} and {other} both choose training's operators; keep one of them"


def _quoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return "; the quotes are part of the value, take them away" if quoted else ""


LONGEST_SHOWN = 200
"""Characters of a value that are shown; the rest is only counted."""


_SECRET = (
    "PASS(?:WORD|WD|PHRASE)|SECRET|CREDENTIAL|COOKIE|(?:API|ACCESS|PRIVATE)_?KEY|TOKEN(?![A-Z])"
    "|(?<![A-Z])(?:PWD|AUTH|BEARER|SIG|SIGNATURE|KEY)(?![A-Z])"
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRET_IN_URL = re.compile(rf"([?&;][^=&;]*(?:{_SECRET})[^=&;]*=)[^&;]*", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(r"((?:^|[\s;,])(?:password|passwd|pwd|secret)\s*=\s*)[^\s;,]+", re.IGNORECASE)
_LOGIN = re.compile(r"^[^\s/:@]+:[^\s/@]+@(?=\S)")


def shown(name: str, text: str) -> str:
    """Return the value of variable ``name`` as it may be printed: without what ``secret`` finds in it, and not long."""
    if _SECRET_NAME.search(name):
        return "***"
    text = _without_secrets(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def secret(name: str, text: str) -> bool:
    """Return whether a variable holds a password, a token or a key, by its name or its value."""
    return bool(_SECRET_NAME.search(name)) or _without_secrets(text) != text


def _without_secrets(text: str) -> str:
    """Return ``text`` with *** for the logins and secret parameters of a URL or of another way to name a server."""
    if "://" in text:
        scheme, _, rest = text.partition("://")
        text = f"{scheme}://***@{rest.rpartition('@')[2]}" if "@" in rest else text
        text = _SECRET_IN_URL.sub(r"\1***", text)
    return _LOGIN.sub("***@", _SECRET_IN_TEXT.sub(r"\1***", text))


def misspelt(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a warning, with the nearest real name, for every variable that only looks like one of the table's.

    Of the overlay's own variables all others are unknown.  A component of the stack may know others, so there a name is
    taken for misspelt only if one of the table's is nearly the same.
    """
    environment = os.environ if environment is None else environment
    warnings = []
    for name in sorted(environment):
        if name in TABLE:
            continue
        if name.startswith(OWN_PREFIX):
            warnings.append(f"{name} is not a variable of verl-fl-overlay{nearest(name, TABLE)}")
        elif name.startswith("ROLLOUT_FL_"):
            warnings.append(f"{name} is read by nothing; rollout reads {name.replace('ROLLOUT_FL_', 'VLLM_FL_')}")
        elif name.startswith(PREFIXES):
            as_long = [known for known in TABLE if known[:4] == name[:4] and abs(len(known) - len(name)) <= 2]
            found = nearest(name, as_long, likeness=0.9) if as_long else ""
            if found:
                warnings.append(f"{name} is no variable of the FlagOS stack that verl-fl-overlay knows{found}")
    return warnings
