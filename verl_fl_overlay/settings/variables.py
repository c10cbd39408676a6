"""What an environment variable is: its name, who reads it, and the reader that turns its text into a value."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

from verl_fl_overlay.errors import NOT_JSON

T = TypeVar("T")


class Values(Protocol):
    """An object with the parsed values: variable's name -> value, for the variables that were set."""

    @property
    def parsed(self) -> Mapping[str, Any]:
        """The values."""


class MalformedError(ValueError):
    """A value that its variable does not allow; the text says what is allowed."""


class BlankError(ValueError):
    """A blank text, if its reader takes that for not set."""


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
    """Read one of ``allowed``, in any case; blank counts as not set."""

    def read(text: str) -> str:
        lowered = text.strip().lower()
        if not lowered:
            raise BlankError
        if lowered not in allowed:
            raise MalformedError("one of " + ", ".join(repr(a) for a in allowed))
        return lowered

    return read


def path(text: str) -> str:
    """Read a file system path for the overlay itself; ``~`` is expanded, as other components do not do."""
    return os.path.expanduser(text.strip())


def file(text: str) -> str:
    """Read the path of a file, which need not exist."""
    read = path(text)
    if read and (os.path.isdir(read) or read.endswith(os.sep)):
        raise MalformedError("a file, and this is a directory")
    return read


def listed(text: str) -> tuple[str, ...]:
    """Read a comma-separated list; blank means an empty list, and commas alone are not allowed."""
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


FUSED = ("rms_norm", "gated_mlp", "experts", "rotary", "adam")
"""The kinds that have a fused kernel: modules and functions of a model, and torch's Adam and AdamW."""


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


def recompute(text: str) -> str | int:
    """Read all or auto (these words), none (0), or a number; blank counts as all."""
    lowered = text.strip().lower() or "all"
    if lowered in ("all", "auto"):
        return lowered
    if lowered == "none":
        return 0
    if not (lowered.isascii() and lowered.isdigit()):
        raise MalformedError("all, none, auto, or how many layers of a model recompute, such as 12")
    return int(lowered)


def directory(text: str) -> str:
    """Read the path of a directory, which need not be on this machine; a path to anything else is refused."""
    found = text.strip()
    if os.path.exists(found) and not os.path.isdir(found):
        raise MalformedError("a directory; this is a file")
    return found


def integer(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text.strip())
    except ValueError as error:
        raise MalformedError("a whole number") from error


def words(text: str) -> str:
    """Read any text; blanks around it are dropped."""
    return text.strip()


def choices_per_op(text: str) -> dict[str, tuple[str, ...]]:
    """Read ``op=token|token;op=token`` into op -> tokens, in the order of preference."""
    chosen: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        op, equals, tokens = part.partition("=")
        found = tuple(token for piece in tokens.split("|") if (token := piece.strip()))
        if not equals or not op.strip() or not found:
            raise MalformedError(f"op=token|token;op=token ...; the part {part!r} is not of that form")
        chosen[op.strip()] = found
    return chosen


def json_file(text: str) -> str:
    """Read the path of a file with a JSON object of texts; the component that reads it needs it on this machine."""
    found = text.strip()
    if not found:
        return found
    try:
        with open(found, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, *NOT_JSON) as error:
        raise MalformedError(f"a JSON file; {error}") from error
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise MalformedError("a JSON file of one object whose values are texts; this file holds something else")
    return found


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable: its name, who reads it and when, and what its text means.

    ``read`` turns the text into the value, or raises ``MalformedError``.  ``default`` is the value where the variable
    is not set.  ``component`` reads it, in ``phase`` (training, rollout, common or build).  ``since`` is the first
    release of the component that reads it, "" for all.  A variable that not every version reads names the file that
    reads it (``read_by``, such as ``vllm_fl/utils.py``), and ``now`` if the newest version reads another one instead.
    ``truths`` are the spellings that the component itself takes for true, if they are fewer than those of ``flag``.

    As an attribute of ``Settings`` it is the value; as an attribute of the class it is the variable itself.
    """

    name: str
    read: Callable[[str], T]
    default: T
    allowed: str
    help: str
    component: str = "verl-fl-overlay"
    phase: str = "common"
    since: str = ""
    truths: tuple[str, ...] = ()
    read_by: str = ""
    now: str = ""

    @overload
    def __get__(self, settings: None, owner: Any) -> Variable[T]: ...

    @overload
    def __get__(self, settings: Values, owner: Any) -> T: ...

    def __get__(self, settings: Values | None, owner: Any) -> Variable[T] | T:
        if settings is None:
            return self
        value: T = settings.parsed.get(self.name, self.default)
        return value
