"""The FlagGems that is installed here: which operators it has for this chip, and under which names.

FlagGems is imported here and nowhere else, and only when ``load`` is called: its import starts the accelerator's
runtime, so it has to wait until the worker has chosen its device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.flaggems import tuner
from verl_fl_overlay.flaggems.database import own_database

OLDEST = Version("5.0.0")
INSTALL = "pip install 'flag-gems>=5.0.0'"


class FlagGemsError(OverlayError):
    """FlagGems was asked for and cannot be used here; says what was found and what to do."""


@dataclass(frozen=True)
class Kernel:
    """One aten key ("add.Tensor"), FlagGems' function for it, and the dispatch keys it goes to ("CUDA", ...)."""

    key: str
    function: Callable[..., Any]
    dispatch_keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name, which is the name that FlagGems and its lists know."""
        return function_name(self.function)


@dataclass(frozen=True)
class FlagGems:
    """An installed FlagGems: the kernels it offers here, and the functions it has but not for this chip or torch."""

    version: str
    vendor: str
    kernels: tuple[Kernel, ...]
    not_here: frozenset[str] = frozenset()
    enabled_before: str = ""
    """What was enabled in this process before the overlay loaded FlagGems, "" if nothing."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions offered here, sorted."""
        return tuple(sorted({kernel.name for kernel in self.kernels}))


def function_name(function: Callable[..., Any]) -> str:
    """Return the name by which FlagGems' own lists know ``function``."""
    return str(getattr(function, "__name__", function))


def installed_version() -> str:
    """Return the version of the installed FlagGems without importing it, "" if there is none."""
    module = sys.modules.get("flag_gems")
    if module is not None:
        return str(getattr(module, "__version__", ""))
    try:
        return importlib.metadata.version("flag-gems")
    except importlib.metadata.PackageNotFoundError:
        return ""


def load() -> FlagGems:
    """Import FlagGems and ask it what it would register here; nothing is registered.

    Raises:
        FlagGemsError: it is missing, older than 5.0, lacks triton, or does not know this chip.
    """
    version = installed_version()
    if _older(version):
        raise FlagGemsError(
            f"flag_gems {version} is here; routing needs flag_gems >= {OLDEST} (the older ones cannot be asked for "
            f"single operators): {INSTALL}"
        )
    before = _enabled_before()
    module = _import()
    kernels = _offered(module)
    by_function = getattr(module, "FULL_CONFIG_BY_FUNC", {})
    return FlagGems(
        version=str(getattr(module, "__version__", version)),
        vendor=str(getattr(module, "vendor_name", "not known")),
        kernels=kernels,
        not_here=frozenset(by_function) - {kernel.name for kernel in kernels},
        enabled_before=before,
    )


def _older(version: str) -> bool:
    try:
        return bool(version) and Version(Version(version).base_version) < OLDEST
    except InvalidVersion:
        return False  # a vendor's own version name: what that build can do shows when it is used


def _enabled_before() -> str:
    module = sys.modules.get("flag_gems")
    registrar = getattr(module, "current_work_registrar", None)
    if registrar is None:
        return ""
    return f"{len(registrar.get_all_keys())} operators, by a call of flag_gems.enable() or only_enable()"


def _import() -> ModuleType:
    try:
        with own_database() as ours:
            module = importlib.import_module("flag_gems")
            if ours:  # if the database is the user's, the user decides who shares it
                tuner.take_turns()
            return module
    except ModuleNotFoundError as error:
        if error.name == "flag_gems":
            raise FlagGemsError(f"FlagGems is not installed: {INSTALL}") from error
        raise FlagGemsError(f"flag_gems cannot be imported, it needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # its probing of the chip may raise anything
        said = " ".join(str(error).split()).rstrip(". ")
        raise FlagGemsError(
            f"flag_gems cannot be imported: {type(error).__name__}: {said}. It has no CPU "
            "kernels and has to know the chip; GEMS_VENDOR names it (nvidia, ascend, metax, ...)"
        ) from error


def _offered(module: ModuleType) -> tuple[Kernel, ...]:
    """Run FlagGems' own registration with a registrar that only records.

    So FlagGems itself applies its conditions on torch and its vendors' replacements and exclusions, in every version.
    The registrar's module moved between versions, so it is found as a default argument of ``enable``.
    """
    parameters = inspect.signature(module.enable).parameters
    if "registrar" not in parameters:
        raise FlagGemsError(f"flag_gems.enable() takes no registrar: this is not flag_gems >= {OLDEST}: {INSTALL}")
    kernels: list[Kernel] = []

    class Notes(parameters["registrar"].default):  # type: ignore[misc]
        def register_impl(
            self, key: str, fn: Callable[..., Any], extra_dispatch_keys: tuple[str, ...] = (), *rest: Any
        ) -> None:
            kernels.append(Kernel(key, fn, (self.reg_key, *extra_dispatch_keys)))

    with _registrar_kept(module):
        module.enable(lib=None, unused=[], registrar=Notes)
    by_key = {kernel.key: kernel for kernel in kernels if _torch_has(kernel.key)}
    return tuple(by_key.values())


def _torch_has(key: str) -> bool:
    """Tell whether torch has the operator; torch accepts a registration for one that it lacks, and never calls it."""
    import torch

    name, _, overload = key.partition(".")
    try:
        torch._C._dispatch_find_schema_or_throw(f"aten::{name}", overload)
    except RuntimeError:
        return False
    return True


@contextmanager
def _registrar_kept(module: ModuleType) -> Iterator[None]:
    """Restore FlagGems' note of who enabled it last; the note may be missing, since ``use_gems`` deletes it."""
    missing = object()
    kept = getattr(module, "current_work_registrar", missing)
    try:
        yield
    finally:
        if kept is missing:
            vars(module).pop("current_work_registrar", None)
        else:
            module.current_work_registrar = kept  # type: ignore[attr-defined]
