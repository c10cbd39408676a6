"""Pins: the fingerprints of every hooked function in every release, and the check of a live function against them.

A pinned package is a row in ``PACKAGES``; nothing else knows which packages have pins.

The overlay loads this file in every process.  The code that reads verl's source is in ``release``, not loaded there.
"""

from __future__ import annotations

import functools
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from verl_fl_overlay import compat
from verl_fl_overlay.errors import HookError, OverlayError
from verl_fl_overlay.hooks import Hook, being_imported

_PREFIX: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Fingerprint:
    """The definition that a name stands for.

    ``kind`` is function, async function, classmethod, staticmethod, property, class, attribute, instance attribute,
    import (from outside the package) or missing.  The ``parameters`` of a class are its abstract members, which a
    subclass must define.  ``at`` is the ``module:name`` of the definition.  ``decorators`` are those that may change
    how the function is called.  ``words`` are some names of its body: a file that lacks one of them cannot hold it.
    ``source`` is the definition's text without docstring, comments and blank lines; the pins do not keep it, because
    it is the package's text.
    """

    kind: str
    parameters: tuple[str, ...] = ()
    body: str = ""
    at: str = ""
    decorators: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    source: tuple[str, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as a pins file stores it."""
        kept = {name: value for name, value in vars(self).items() if value and name != "source"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    @classmethod
    def from_json(cls, pin: dict[str, Any]) -> Fingerprint:
        """Read what ``to_json`` wrote."""
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in pin.items()}
        return cls(**values)

    def same_contract(self, other: Fingerprint) -> bool:
        """Compare kind, names and order of the parameters, and which ones have defaults; ignore the default values."""
        return self.kind == other.kind and shape(self.parameters) == shape(other.parameters)


MISSING = Fingerprint("missing")
FUNCTIONS = ("function", "async function", "classmethod", "staticmethod", "property")
"""The kinds that can be hooked; they have a body, by which they can be found again."""
INSTANCE_ATTRIBUTE = "instance attribute"
"""The kind of an attribute that only instances have: a method assigns it to ``self``, or the class only declares it."""


class Package(NamedTuple):
    """A package in which something is pinned: its top-level name, its distribution's, the file that has its version."""

    name: str
    distribution: str
    version_file: str

    @property
    def folder(self) -> str:
        """Where its pins lie, below ``compat``: verl's in ``pins`` itself, another package's in a folder of its own."""
        return "pins" if self == VERL else f"pins/{self.distribution}"

    @property
    def releases(self) -> tuple[str, ...]:
        """Its pinned releases, oldest first."""
        return compat.RELEASES if self == VERL else compat.releases_in(self.folder)


VERL = Package("verl", "verl", "verl/version/version")
PACKAGES = {
    package.name: package
    for package in (
        VERL,
        Package("transformers", "transformers", "transformers/__init__.py"),
    )
}
"""Top-level name -> package.  A row here is all that a package needs to be pinned, checked and reported."""


def top_level(target: str) -> str:
    """Return the top-level package of a module, or of ``module:attribute``."""
    return target.partition(":")[0].partition(".")[0]


def shape(parameters: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Return each name and whether it has a default; the default itself is text in source and a value in a process."""
    return [(parameter.partition("=")[0], "=" in parameter) for parameter in parameters]


HOOKS, TRIAL = "functions", "trial"
"""The parts of a pins file: what the hooks of the release use, and in verl's what the trial step uses."""


@functools.cache
def load(release: str, part: str = HOOKS, package: Package = VERL) -> dict[str, Fingerprint]:
    """Return the pins of ``release``: ``module:attribute`` -> fingerprint.

    Raises:
        OverlayError: the pins file is missing or damaged; without it every function would be accepted.
    """
    file = f"{package.folder}/{release}.json"
    try:
        found = json.loads(pkgutil.get_data(__package__, file) or "")[part]  # also from within a zip
        return {target: Fingerprint.from_json(pin) for target, pin in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OverlayError(
            f"verl_fl_overlay/compat/{file} is missing or damaged ({type(error).__name__}: {error}): reinstall "
            "verl-fl-overlay"
        ) from error


def pinned(target: str, part: str = HOOKS) -> dict[str, Fingerprint]:
    """Return release -> fingerprint, oldest first, for every release in which ``target`` is pinned.

    Raises:
        OverlayError: the pins of its package are damaged, or there are none.
    """
    package = PACKAGES.get(top_level(target))
    if package is None:
        return {}
    if not package.releases:
        raise OverlayError(f"verl_fl_overlay/compat/{package.folder} holds no pins: reinstall verl-fl-overlay")
    return {release: pins[target] for release in package.releases if target in (pins := load(release, part, package))}


def is_late(pins: dict[str, Fingerprint]) -> bool:
    """Return whether in some release only instances have it; then the class does not show whether it exists."""
    return any(pin.kind == INSTANCE_ATTRIBUTE for pin in pins.values())


def has_contract(pins: dict[str, Fingerprint]) -> bool:
    """Return whether kind and parameters must match, as for functions and classes; anything else only has to exist."""
    return all(pin.kind in (*FUNCTIONS, "class") for pin in pins.values())


def verify(hook: Hook, target: Any) -> None:
    """Compare a live target, and what its hook relies on, with the pins; the pin of any release may match.

    Targets outside ``PACKAGES`` are not pinned and not compared.  Nothing is imported for this: if a name is in a
    module that is not loaded yet or gives its names when they are asked for, or if only instances have it, its absence
    is noticed when the wrapper reads it.  A package's pins are read when the first of its targets is verified.

    Raises:
        HookError: kind or parameters differ from those of every pinned release; the text shows both sides.
        OverlayError: the pins themselves cannot be read.
    """
    _verify_contract("it", hook.target, target)
    for reliance in hook.relies_on:
        name, _, attribute = reliance.partition(":")
        module = sys.modules.get(name)
        if module is None or (name != hook.module and being_imported(module)):
            continue
        pins = pinned(reliance)
        if not pins or is_late(pins):
            continue
        try:
            found = functools.reduce(inspect.getattr_static, attribute.split("."), module)
        except AttributeError as error:
            if hasattr(module, "__getattr__"):
                continue
            raise HookError(f"it relies on {reliance}, which is not there") from error
        if has_contract(pins):
            _verify_contract(f"it relies on {reliance}, which", reliance, found)


def _verify_contract(what: str, name: str, target: Any) -> None:
    contracts = {(pin.kind, pin.parameters): release for release, pin in pinned(name).items()}
    if not contracts:
        return
    found = live(target)
    if _is_stub(target):
        raise HookError(f"{what} only raises NotImplementedError; the function that the hook is for is elsewhere")
    if any(found.same_contract(Fingerprint(*contract)) for contract in contracts):
        return
    package = PACKAGES[top_level(name)]
    if _is_wrapper_of_others(target, found, package) and found.kind in {kind for kind, _ in contracts}:
        return
    expected = " or ".join(
        f"{signature(Fingerprint(*contract))} as in {package.distribution} {release}"
        for contract, release in contracts.items()
    )
    raise HookError(f"{what} is {signature(found)}, expected {expected}")


def _is_wrapper_of_others(target: Any, found: Fingerprint, package: Package) -> bool:
    """Return whether this is another plugin's wrapper: (*args, **kwargs), with at most one parameter before them.

    A function from a module of ``package`` may have no parameter before them: the package itself would have added it.
    """
    *leading, variadic, keywords = found.parameters if len(found.parameters) > 1 else ("", "")
    passes_on = variadic.startswith("*") and keywords.startswith("**")
    own = str(getattr(target, "__module__", "")).startswith(f"{package.name}.")
    return passes_on and len(leading) <= (0 if own else 1)


def _is_stub(target: Any) -> bool:
    function = inspect.unwrap(getattr(target, "__func__", target))
    return getattr(getattr(function, "__code__", None), "co_names", ()) == ("NotImplementedError",)


def signature(fingerprint: Fingerprint) -> str:
    """Return kind and parameters as they are reported: ``classmethod (cls, name)``."""
    return f"{fingerprint.kind} ({', '.join(fingerprint.parameters)})"


def live(target: Any) -> Fingerprint:
    """Fingerprint a live function or class: its contract only; defaults are written as ``repr`` gives them."""
    kind = "function"
    function = target
    for special in (classmethod, staticmethod, property):
        if isinstance(target, special):
            kind = special.__name__
            function = target.fget if isinstance(target, property) else target.__func__
    if not callable(function):
        return Fingerprint("attribute")
    if kind == "function" and isinstance(function, type):
        return Fingerprint("class", tuple(sorted(getattr(function, "__abstractmethods__", ()))))
    if kind == "function" and inspect.iscoroutinefunction(inspect.unwrap(function)):
        kind = "async function"
    return Fingerprint(kind, tuple(_parameters(function)))


def _parameters(function: Any) -> Iterator[str]:
    """Yield the parameters in the notation of the pins."""
    parameters = list(inspect.signature(function).parameters.values())
    starred = False
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        prefix = _PREFIX.get(parameter.kind, "")
        starred = starred or prefix == "*"
        yield f"{prefix}{parameter.name}" + ("" if parameter.default is parameter.empty else f"={parameter.default!r}")
        following = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if parameter.kind is parameter.POSITIONAL_ONLY and following is not parameter.POSITIONAL_ONLY:
            yield "/"
