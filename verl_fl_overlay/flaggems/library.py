"""The FlagGems that is installed here: which operators it has for this chip, and under which names.

FlagGems is imported here and nowhere else, and only when ``load`` is called: its import starts the accelerator's
runtime, so it has to wait until the worker has chosen its device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from verl_fl_overlay import packages
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.flaggems import database, faults, tuner

OLDEST = Version("5.0.0")
INSTALL = "verl-fl install-hint flaggems"


class FlagGemsError(OverlayError):
    """FlagGems was asked for and cannot be used here; says what was found and what to do."""


@dataclass(frozen=True)
class Kernel:
    """One aten key ("add.Tensor"), FlagGems' function for it or its name, and the dispatch keys it goes to ("CUDA").

    ``fault`` is what is known to be wrong with it in this version, "" if nothing.
    """

    key: str
    function: Any
    dispatch_keys: tuple[str, ...] = ()
    fault: str = ""

    @property
    def name(self) -> str:
        """The function's name, which is the name that FlagGems and its lists know."""
        return function_name(self.function)


@dataclass(frozen=True)
class FlagGems:
    """An installed FlagGems: the kernels it offers here, and the functions it has but not for this chip or torch.

    ``registrar`` is FlagGems' own object for what it registers; it has registered nothing.
    """

    version: str
    vendor: str
    kernels: tuple[Kernel, ...]
    not_here: frozenset[str] = frozenset()
    registrar: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions offered here, sorted."""
        return tuple(sorted({kernel.name for kernel in self.kernels}))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it, in words."""
        if release(self.version) is not None:
            return ()
        return (
            f"flag_gems says that it is version {self.version or 'none'}, and it can do what only {OLDEST} and newer "
            "can: it is used, and counts as having every fault that is known of any version",
        )


def function_name(function: Callable[..., Any]) -> str:
    """Return the name by which FlagGems' own lists know ``function``."""
    return str(getattr(function, "__name__", function))


def installed_version() -> str:
    """Return the version of the installed FlagGems without importing it, "" if there is none."""
    module = sys.modules.get("flag_gems")
    if module is not None:
        return str(getattr(module, "__version__", ""))
    return packages.version("flag-gems")


def release(version: str) -> Version | None:
    """Return the ``version`` that FlagGems says it is; None if that cannot be.

    A build of a copy without its tags, as vendors' images have, says 0.1.0, "unknown" or a name of the vendor's own.
    """
    try:
        said = Version(version)
    except InvalidVersion:
        return None
    return said if Version(said.base_version) >= OLDEST else None


def load() -> FlagGems:
    """Import FlagGems and ask it what it would register here; nothing is registered.

    Raises:
        FlagGemsError: it is missing, older than 5.0, lacks triton, or does not know this chip.
    """
    module = _import()
    version, vendor = installed_version(), str(getattr(module, "vendor_name", "not known"))
    offered, registrar = _offered(module)
    kernels = tuple(replace(k, fault=faults.known(k.key, release(version), vendor)) for k in offered)
    by_function = getattr(module, "FULL_CONFIG_BY_FUNC", {})
    not_here = frozenset(by_function) - {kernel.name for kernel in kernels}
    return FlagGems(version, vendor, kernels, not_here, registrar)


@functools.cache
def in_source() -> FlagGems | None:
    """Return what the table in the installed FlagGems' source holds, without importing it; None if there is none.

    Which of it FlagGems offers depends on the chip and on torch.  A kernel's ``function`` is a name here.
    """
    text = packages.source("flag_gems/__init__.py") or ""
    table = re.search(r"^_FULL_CONFIG = \($(.*?)^\)$", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r'^ *\(\s*"([\w.]+)",\s*([\w.]+)', table[1], re.MULTILINE) if table else []
    kernels = tuple(Kernel(key, function) for key, function in rows)
    return FlagGems(installed_version(), "", kernels) if kernels else None


def _import() -> ModuleType:
    try:
        database.give_each_process_its_own()
        module = importlib.import_module("flag_gems")
        if not os.environ.get(database.VARIABLE):  # if the database is the user's, the user decides who shares it
            tuner.take_turns()
        return module
    except ModuleNotFoundError as error:
        if error.name == "flag_gems":
            raise FlagGemsError(f"FlagGems is not installed: {INSTALL}") from error
        raise FlagGemsError(f"flag_gems cannot be imported, it needs {error.name}: {INSTALL}") from error
    except Exception as error:  # its probing of the chip may raise anything
        said = " ".join(str(error).split()).rstrip(". ")
        raise FlagGemsError(
            f"flag_gems cannot be imported: {type(error).__name__}: {said}. It has no CPU "
            "kernels and has to know the chip; GEMS_VENDOR names it (nvidia, ascend, metax, ...)"
        ) from error


def _offered(module: ModuleType) -> tuple[tuple[Kernel, ...], Any]:
    """Run FlagGems' own registration with a registrar that only records; return the kernels and the registrar.

    So FlagGems itself applies its conditions on torch and its vendors' replacements and exclusions, in every version.
    The registrar's module moved between versions, so it is found as a default argument of ``enable``.  That ``enable``
    takes one which can be asked for single operators tells FlagGems 5 from older ones; a version's name may be wrong.

    Raises:
        FlagGemsError: it takes none, or an older one.
    """
    parameter = inspect.signature(module.enable).parameters.get("registrar")
    theirs: Any = parameter.default if parameter else None
    if theirs is None or "user_include_ops" not in inspect.signature(theirs).parameters:
        raise FlagGemsError(
            f"flag_gems {installed_version()} is here, whose enable() takes no registrar that can be asked for single "
            f"operators; routing needs flag_gems >= {OLDEST}: {INSTALL}"
        )
    kernels: list[Kernel] = []

    class Notes(theirs):  # type: ignore[misc]
        def register_impl(
            self, key: str, fn: Callable[..., Any], extra_dispatch_keys: tuple[str, ...] = (), *rest: Any
        ) -> None:
            kernels.append(Kernel(key, fn, (self.reg_key, *extra_dispatch_keys)))

    with _registrar_kept(module):
        module.enable(lib=None, unused=[], registrar=Notes)
        registrar = module.current_work_registrar
    by_key = {kernel.key: kernel for kernel in kernels if _torch_has(kernel.key)}
    return tuple(by_key.values()), registrar


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
