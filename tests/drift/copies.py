"""A copy of a package's hooked files, and its modules imported without what the package itself needs.

A copied module is executed as it is.  Whatever it imports from outside the copy and the standard library becomes a
placeholder: what the gate looks at, the functions with their kinds and parameters, is the copy's own.
"""

from __future__ import annotations

import abc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from verl_fl_overlay import activation
from verl_fl_overlay.compat.pins import PACKAGES, top_level
from verl_fl_overlay.compat.release import pinning
from verl_fl_overlay.compat.release.fingerprint import fingerprint
from verl_fl_overlay.compat.release.sources import Tree

KEPT = {*sys.stdlib_module_names, "verl_fl_overlay", "wrapt", "packaging"}


class _Placeholder(abc.ABCMeta):
    """A class that stands for anything a module does with a name at import: subclass it, call it, decorate by it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and isinstance(args[0], FunctionType | type)
        return args[0] if decorates else placeholder(cls.__name__)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls

    def __lt__(cls, other: Any) -> bool:
        return False

    def __ge__(cls, other: Any) -> bool:
        return True

    def __iter__(cls) -> Iterator[Any]:
        return iter((placeholder("first"), placeholder("second")))  # what is unpacked at import is a pair


def placeholder(name: str) -> Any:
    return _Placeholder(name, (), {})


class _PlaceholderModule(ModuleType):
    __version__ = "99"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in KEPT:
            return None
        file = self._folder / f"{name.replace('.', '/')}.py"
        if "." in name and top_level(name) in PACKAGES and file.is_file():
            return importlib.util.spec_from_file_location(name, file)
        package = self._folder / name / "__init__.py"
        if name == "verl" and package.is_file():
            return importlib.util.spec_from_file_location(name, package)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _import(folder: Path, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:  # part of a circle of imports, which verl enters by another module of the package
        package = name.rpartition(".")[0]
        for file in sorted((folder / package.replace(".", "/")).glob("*_manager.py")):
            importlib.import_module(f"{package}.{file.stem}")
        return importlib.import_module(name)


@contextmanager
def imported(folder: Path, name: str) -> Iterator[ModuleType]:
    """Import the copied module ``name``; afterwards the process has the modules that it had before.

    The overlay, which activates itself with the first verl that is imported, does not: the copy may be broken.
    """
    before = dict(sys.modules)
    for module in before:
        if top_level(module) in PACKAGES:
            del sys.modules[module]
    finder = _Finder(folder)
    wrapts = [type(found).__module__.partition(".")[0] == "wrapt" for found in sys.meta_path]
    sys.meta_path.insert(
        wrapts.index(True) + 1 if any(wrapts) else 0, finder
    )  # wrapt asks it, and then calls the hooks
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cached copy of the same second is stale
    try:
        with patch.object(activation, "activate"):
            module = _import(folder, name)
        yield module
    finally:
        sys.dont_write_bytecode = dont_write
        sys.meta_path.remove(finder)
        for module in list(sys.modules):
            if module not in before:
                del sys.modules[module]
        sys.modules.update(before)


def hooked_files(tree: Tree) -> dict[str, str]:
    """Return path -> text of every file in which something is hooked, relied on or defined, and of the version."""
    targets = pinning.targets(pinning.shim_for(tree).hooks, tree.package)
    defined = [fingerprint(tree, *target.split(":")).at for target in targets]
    paths = {tree.source_of(target.partition(":")[0]) for target in [*targets, *defined]} - {None}
    return {path: text for path in sorted({*paths, tree.package.version_file}) if (text := tree.read(path)) is not None}


def write(files: dict[str, str], folder: Path) -> Tree:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    package = PACKAGES[top_level(next(iter(files)).replace("/", "."))]
    return Tree(folder, "a changed copy", package=package)
