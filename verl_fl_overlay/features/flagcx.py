"""FlagCX as torch's collectives: finds its plugin, imports it before the first group, and names it as torch expects.

FlagCX's torch plugin registers the backend ``flagcx`` when it is imported; nothing in verl imports it.  It is in
site-packages, or under FLAGCX_PATH if only the library was built.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import FlagCXError
from verl_fl_overlay.features import flagcx_library
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.features.flagcx_collectives import Collectives
from verl_fl_overlay.packages import version
from verl_fl_overlay.settings import Settings

logger = logging.getLogger("verl_fl_overlay")

BACKEND = chips.FLAGCX
PLUGIN_FOLDER = "plugin/torch"


@dataclass(frozen=True)
class Loaded:
    """The imported plugin: its file, the library that is really mapped, the device it serves, and who imported it.

    ``version`` is the installed package's, "" if there is none: the library itself says 1.0.0 in every release.
    ``conflict`` says what is wrong if the library is not the one of FLAGCX_PATH alone, else "".
    """

    plugin: str
    library: str
    version: str
    device: str
    loaded_by: str
    conflict: str


class FlagCX(Feature):
    """Gives training's process groups to FlagCX, guards them, and refuses communication that bypasses it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.loaded: Loaded | None = None
        """None before the first group."""
        self.guards = Collectives(BACKEND)

    def start(self) -> None:
        """Answer what verl asks about collectives.

        Raises:
            FlagCXError: VERL_FL_STRICT=1, and torch has its process groups already.
        """
        torch_groups: Any = sys.modules.get("torch.distributed")
        if torch_groups is not None and torch_groups.is_available() and torch_groups.is_initialized():
            late = (
                "torch's process groups were initialised before verl was imported: they may not be FlagCX's, and have "
            )
            events.failures.record("FlagCX", FlagCXError(f"{late}no guards. Import verl first"))
        self.undo.callback(events.flagcx_backend.answer(lambda: BACKEND))
        self.undo.callback(events.group_backend.answer(self.for_group))
        self.undo.callback(events.past_torch.answer(refuse))
        self.undo.callback(events.group_guard.answer(self.guard))
        self.undo.callback(self.guards.remove)

    def for_group(self, backend: Any) -> Any:
        """Return what to initialise a group with instead of ``backend``; import the plugin if the text names FlagCX.

        A bare ``flagcx`` becomes ``cpu:gloo,<device>:flagcx``, because verl also gathers CPU tensors and objects.
        A ``backend`` that does not name FlagCX is returned unchanged.

        Raises:
            FlagCXError: the plugin or its library is not there or cannot be loaded; names the file and what was tried.
        """
        if not isinstance(backend, str) or BACKEND not in backend.lower():
            return backend
        if self.loaded is None:
            loaded = load()
            if loaded.conflict:
                events.failures.record("one libflagcx.so for all", FlagCXError(loaded.conflict))
            self.loaded = loaded
        return f"cpu:gloo,{self.loaded.device}:{BACKEND}" if backend.strip().lower() == BACKEND else backend

    def guard(self, what: str) -> None:
        """Put one guard around the collectives of FlagCX's groups, from when the first group was asked for."""
        if self.loaded is None or what in self.guards.on:
            return
        if what == "timeout":
            logger.warning(
                "FlagCX ignores timeouts, those of groups (nccl_timeout, 10 minutes if not set) and of Work.wait: if "
                "a rank fails, the others wait for it without end"
            )
        self.guards.put_on(what)

    def describe(self) -> dict[str, Any]:
        """Return what is loaded (no plugin before the first group), FLAGCX_PATH, and the guards that are on."""
        return {
            **(asdict(self.loaded) if self.loaded else {"plugin": ""}),
            "library path": os.environ.get("FLAGCX_PATH", ""),
            "guards": sorted(self.guards.on),
        }


def load() -> Loaded:
    """Import the plugin; return what was loaded.

    Raises:
        FlagCXError: see ``FlagCX.for_group``.
    """
    folder = os.environ.get("FLAGCX_PATH", "").strip()
    library = flagcx_library.within(folder) if folder else ""
    by_torch = "torch, when it was imported (TORCH_DEVICE_BACKEND_AUTOLOAD=0 leaves that to the overlay)"
    by = by_torch if BACKEND in sys.modules else "the overlay"
    found = find_spec(BACKEND)
    if found is None or found.origin is None:  # no origin: only a folder of that name, such as FlagCX's sources
        _add_plugin(folder)
    try:
        module = _import()
    except (ImportError, OSError) as error:
        if not library or flagcx_library.NOT_FOUND not in str(error):
            raise _not_imported(error, folder) from error
        flagcx_library.name(library)  # the plugin was built elsewhere
        try:
            module = _import()
        except (ImportError, OSError) as again:
            raise _not_imported(again, folder, os.path.dirname(library)) from again
    plugin = str(getattr(module, "__file__", None) or BACKEND)
    mapped = flagcx_library.mapped()
    conflict = _conflict(plugin, mapped, folder, library)
    return Loaded(plugin, ", ".join(mapped), version(BACKEND), _device(plugin), by, conflict)


def _device(plugin: str) -> str:
    """Return the torch device that the imported plugin serves."""
    from torch.distributed import Backend

    served = [name for name in Backend.backend_capability.get(BACKEND, []) if name != "cpu"]
    if not served:
        raise FlagCXError(f"FlagCX's torch plugin ({plugin}) registered no backend {BACKEND!r}; build it anew")
    return str(served[0])


def _conflict(plugin: str, mapped: list[str], folder: str, library: str) -> str:
    others = [file for file in mapped if not library or os.path.realpath(file) != os.path.realpath(library)]
    if not others or (not library and len(others) == 1):
        return ""
    return (
        f"FlagCX's torch plugin {plugin} uses {', '.join(others)}"
        + (f", and FLAGCX_PATH={folder} names {library}, which rollout (vllm-plugin-FL) loads" if library else "")
        + ": two builds of FlagCX in one run. Set FLAGCX_PATH to the build that the plugin belongs to, or install that "
        f"build's plugin: pip install --no-deps --no-build-isolation {folder or '<FlagCX>'}/{PLUGIN_FOLDER}"
    )


def _import() -> Any:
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    try:
        return importlib.import_module(BACKEND)
    finally:
        if autoload is not None:  # the plugin's import deletes it
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload


def _not_imported(error: Exception, folder: str, library_folder: str = "") -> FlagCXError:
    ways = "Build"
    if library_folder:
        ways = f"LD_LIBRARY_PATH={library_folder}:$LD_LIBRARY_PATH may help, or build"
    elif not folder and flagcx_library.NOT_FOUND in str(error):
        ways = "Set FLAGCX_PATH to the folder that FlagCX was built in, or build"
    return FlagCXError(
        f"FlagCX's torch plugin cannot be imported: {error}. {ways} it for this torch with: "
        f"pip install --no-deps --no-build-isolation {folder or '<FlagCX>'}/{PLUGIN_FOLDER}"
    )


def _add_plugin(folder: str) -> None:
    """Put the plugin of ``folder`` on Python's path: of the sources, or ``folder`` itself if it is the package."""
    places = [Path(folder) / PLUGIN_FOLDER, Path(folder).parent]
    place = next((place for place in places if folder and (place / BACKEND / "__init__.py").is_file()), None)
    if place is None:
        tried = "site-packages" + (f", {places[0] / BACKEND}" if folder else "; FLAGCX_PATH is not set")
        raise FlagCXError(
            f"USE_FLAGCX is on and FlagCX's torch plugin (the package {BACKEND!r}) was not found; tried {tried}. "
            f"Install it with: pip install --no-deps --no-build-isolation {folder or '<FlagCX>'}/{PLUGIN_FOLDER}"
        )
    sys.path.append(str(place))


def refuse(what: str, through: str, way_on: str) -> None:
    """Raise: ``what`` in verl bypasses torch's backends, communicates ``through`` a library, and cannot use FlagCX.

    Raises:
        FlagCXError: names both, and what to do.
    """
    raise FlagCXError(f"verl's {what} communicates through {through}, and USE_FLAGCX=1 asks for FlagCX. {way_on}")
