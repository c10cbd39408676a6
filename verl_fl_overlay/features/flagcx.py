"""FlagCX as torch's collectives: finds its plugin, imports it before the first group, and names it as torch expects.

FlagCX's torch plugin registers the backend ``flagcx`` when it is imported; nothing in verl imports it.  It is in
site-packages, or under FLAGCX_PATH if only the library was built.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import FlagCXError
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings

BACKEND = chips.FLAGCX
LIBRARY = "libflagcx.so"
LIBRARY_FOLDERS = ("lib", "build/lib")
PLUGIN_FOLDER = "plugin/torch"


class FlagCX(Feature):
    """Gives training's process groups to FlagCX, and refuses communication that bypasses it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.plugin = ""
        """The file that the torch plugin came from, "" before the first group."""

    def start(self) -> None:
        """Answer what verl asks about collectives."""
        self.undo.callback(events.flagcx_backend.answer(lambda: BACKEND))
        self.undo.callback(events.group_backend.answer(self.for_group))
        self.undo.callback(events.past_torch.answer(refuse))

    def for_group(self, backend: Any) -> Any:
        """Return what to initialise a group with instead of ``backend``; import the plugin if the text names FlagCX.

        A bare ``flagcx`` becomes ``cpu:gloo,<device>:flagcx``, because verl also gathers CPU tensors and objects.
        A ``backend`` that does not name FlagCX is returned unchanged.

        Raises:
            FlagCXError: the plugin or its library is not there or cannot be loaded; names the file and what was tried.
        """
        if not isinstance(backend, str) or BACKEND not in backend.lower():
            return backend
        self.plugin = self.plugin or load()
        return f"cpu:gloo,{self._device()}:{BACKEND}" if backend.strip().lower() == BACKEND else backend

    def _device(self) -> str:
        """Return the torch device that the imported plugin serves."""
        from torch.distributed import Backend

        served = [name for name in Backend.backend_capability.get(BACKEND, []) if name != "cpu"]
        if not served:
            raise FlagCXError(f"FlagCX's torch plugin ({self.plugin}) registered no backend {BACKEND!r}; build it anew")
        return str(served[0])

    def describe(self) -> dict[str, Any]:
        """Return where the plugin came from ("" before the first group)."""
        return {"plugin": self.plugin, "library path": os.environ.get("FLAGCX_PATH", "")}


def load() -> str:
    """Import the plugin; return the file it came from.

    Raises:
        FlagCXError: see ``FlagCX.for_group``.
    """
    folder = os.environ.get("FLAGCX_PATH", "").strip()
    if folder:
        _load_library(folder)
    found = find_spec(BACKEND)
    if found is None or found.origin is None:  # no origin: only a folder of that name, such as FlagCX's sources
        _add_plugin(folder)
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    try:
        plugin = importlib.import_module(BACKEND)
    except (ImportError, OSError) as error:
        raise FlagCXError(
            f"FlagCX's torch plugin cannot be imported: {error}. Build it for this torch with: "
            f"pip install --no-build-isolation {folder or '<FlagCX>'}/{PLUGIN_FOLDER}"
        ) from error
    finally:
        if autoload is not None:  # the plugin's import deletes it
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    return str(getattr(plugin, "__file__", None) or BACKEND)


def _load_library(folder: str) -> None:
    """Load the library first; then a plugin that was built elsewhere finds it by its name."""
    tried = [Path(folder) / place / LIBRARY for place in LIBRARY_FOLDERS]
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise FlagCXError(
            f"FLAGCX_PATH={folder} holds no {LIBRARY}; tried {', '.join(map(str, tried))}. Build FlagCX there, or set "
            "FLAGCX_PATH to where it was built"
        )
    try:
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise FlagCXError(f"{found} cannot be loaded: {error}. Build FlagCX for this machine") from error


def _add_plugin(folder: str) -> None:
    place = Path(folder) / PLUGIN_FOLDER
    if not folder or not (place / BACKEND / "__init__.py").is_file():
        tried = "site-packages" + (f", {place / BACKEND}" if folder else "; FLAGCX_PATH is not set")
        raise FlagCXError(
            f"USE_FLAGCX is on and FlagCX's torch plugin (the package {BACKEND!r}) was not found; tried {tried}. "
            f"Install it with: pip install --no-build-isolation {folder or '<FlagCX>'}/{PLUGIN_FOLDER}"
        )
    sys.path.append(str(place))


def refuse(what: str, through: str, way_on: str) -> None:
    """Raise: ``what`` in verl bypasses torch's backends, communicates ``through`` a library, and cannot use FlagCX.

    Raises:
        FlagCXError: names both, and what to do.
    """
    raise FlagCXError(f"verl's {what} communicates through {through}, and USE_FLAGCX=1 asks for FlagCX. {way_on}")
