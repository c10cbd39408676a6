"""Pins: the fingerprints of every hooked function in every release, and the check of a live function against them."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from verl_fl_overlay.errors import HookError
from verl_fl_overlay.hooks import Hook

_PREFIX: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
FOLDER = Path(__file__).parent / "pins"


@functools.cache
def load(release: str) -> dict[str, dict[str, Any]]:
    """Return the pins of ``release``: target -> fingerprint as JSON; empty if there is no such file."""
    file = FOLDER / f"{release}.json"
    if not file.is_file():
        return {}
    pins: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["functions"]
    return pins


def pinned(hook: Hook) -> dict[str, dict[str, Any]]:
    """Return release -> fingerprint for every release in which ``hook``'s target is pinned."""
    releases = sorted(file.stem for file in FOLDER.glob("*.json"))
    return {release: pins[hook.target] for release in releases if hook.target in (pins := load(release))}


def verify(hook: Hook, target: Any) -> None:
    """Compare a live target with the pinned contracts; any release's will do.

    Targets outside verl are not pinned and not compared.

    Raises:
        HookError: the parameters differ from those of every pinned release; says which were found and expected.
    """
    contracts = {tuple(pin["parameters"]): release for release, pin in pinned(hook).items()}
    if not contracts:
        return
    found = tuple(live_parameters(target))
    if found == ("*args", "**kwargs") or any(_same(found, contract) for contract in contracts):
        return
    expected = " or ".join(f"({', '.join(c)}) as in verl {release}" for c, release in contracts.items())
    raise HookError(f"its parameters are ({', '.join(found)}), expected {expected}")


def live_parameters(target: Any) -> Iterable[str]:
    """Yield the parameters of a live function in the notation of the pins; defaults as ``repr`` gives them."""
    function = target.__func__ if isinstance(target, classmethod | staticmethod) else target
    for parameter in inspect.signature(function).parameters.values():
        prefix = _PREFIX.get(parameter.kind, "")
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        yield f"{prefix}{parameter.name}{default}"


def _same(found: tuple[str, ...], pinned: tuple[str, ...]) -> bool:
    """Compare names, order and which have defaults; a default's text is only in the source, its value only here."""

    def shape(parameters: tuple[str, ...]) -> list[tuple[str, bool]]:
        return [(p.partition("=")[0], "=" in p) for p in parameters if p not in ("*", "/")]

    return shape(found) == shape(pinned)
