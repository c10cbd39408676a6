"""Which packages are here.  Nothing is imported for this except the parent package of a dotted name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
from importlib.util import find_spec

FLAGOS_BUILDS = {
    "TransformerEngine-FL": ("transformer_engine", "plugin/core/__init__.py"),
    "Megatron-LM-FL": ("megatron", "plugin/decorators.py"),
}
"""FlagOS' build -> NVIDIA's package, which has the same name and version, and a file that only FlagOS' build has."""


def installed(name: str) -> bool:
    """Return whether ``name`` can be imported, or was made by hand and stands in ``sys.modules``."""
    try:
        return find_spec(name) is not None
    except ValueError:  # it is in sys.modules without a spec
        return True
    except Exception:  # its parent package is not there, or cannot be imported
        return False


def has_code(name: str) -> bool:
    """Return whether ``name`` is installed and more than a folder, as a clone beside the program would be."""
    try:
        spec = find_spec(name)
    except ValueError:
        return True
    return spec is not None and spec.origin is not None


def folders(name: str) -> list[str]:
    """Return the folders of the package ``name``; none if it is missing, is a module, or was made by hand."""
    try:
        spec = find_spec(name)
    except ValueError:
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


def flagos_builds() -> dict[str, bool]:
    """Return which of ``FLAGOS_BUILDS`` are here."""
    return {
        build: any(os.path.isfile(os.path.join(folder, file)) for folder in folders(package))
        for build, (package, file) in FLAGOS_BUILDS.items()
    }


@functools.cache
def flash_attn_imports() -> bool:
    """Import flash-attn, once, and return whether that worked; a flash-attn built for another torch fails here."""
    try:
        importlib.import_module("flash_attn.bert_padding")
    except ImportError:
        return False
    return True


def version(distribution: str) -> str:
    """Return the version that a distribution's metadata tell; nothing is imported.

    It is "" if it is not installed, or half of it: an installer that was stopped leaves metadata without a version.
    """
    try:
        return importlib.metadata.version(distribution) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def source(path: str) -> str | None:
    """Return the text of a package's file, such as ``vllm_fl/utils.py``.

    None if the package is not here; "" if it is, without such a file.
    """
    package, _, file = path.partition("/")
    found = folders(package)
    for folder in found:
        with contextlib.suppress(OSError), open(os.path.join(folder, file), encoding="utf-8", errors="replace") as text:
            return text.read()
    return "" if found else None
