"""FlagCX as torch's collectives: found, imported before the first group, and asked for by a name torch understands.

FlagCX's torch plugin registers the backend ``flagcx`` when it is imported; nothing in verl imports it.  It lies in
site-packages, or under FLAGCX_PATH where only the library was built.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_fl_overlay.errors import FlagCXError
from verl_fl_overlay.settings import Settings

BACKEND = "flagcx"
LIBRARY = "libflagcx.so"
LIBRARY_FOLDERS = ("lib", "build/lib")
PLUGIN_FOLDER = "plugin/torch"

NATIVE_ONLY = {
    "nccl": "NCCL (HCCL on Ascend)",
    "delta_sharded": "NCCL",
    "kimi_ckpt_engine": "vLLM's own communicator",
}
"""verl's checkpoint engines that communicate past torch's backends -> what they communicate through."""

_loaded_from = ""


def reason_off(settings: Settings) -> str:
    """Return why training communicates without FlagCX, "" if it was asked for."""
    if settings.device == "cpu":
        return "VERL_FL_DEVICE=cpu: a CPU communicates through gloo"
    return "" if settings["USE_FLAGCX"] else "USE_FLAGCX is not on"


def for_group(backend: Any) -> Any:
    """Return what to initialise a group with instead of ``backend``, FlagCX's plugin imported if the text names it.

    A bare ``flagcx`` becomes ``cpu:gloo,<device>:flagcx``: verl also gathers CPU tensors and objects.  Whatever does
    not name FlagCX is returned as it is.

    Raises:
        FlagCXError: the plugin or its library is not there or cannot be loaded; names the file and the tried places.
    """
    if not isinstance(backend, str) or BACKEND not in backend.lower():
        return backend
    load()
    return f"cpu:gloo,{device()}:{BACKEND}" if backend.strip().lower() == BACKEND else backend


def device() -> str:
    """Return the torch device that the imported plugin serves."""
    from torch.distributed import Backend

    served = [name for name in Backend.backend_capability.get(BACKEND, []) if name != "cpu"]
    if not served:
        raise FlagCXError(f"FlagCX's torch plugin ({_loaded_from}) registered no backend {BACKEND!r}; build it anew")
    return str(served[0])


def load() -> str:
    """Import the plugin, once; return the file it came from.

    Raises:
        FlagCXError: see ``for_group``.
    """
    global _loaded_from
    if _loaded_from:
        return _loaded_from
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
        if autoload is not None:  # the plugin's import takes it away
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    _loaded_from = str(getattr(plugin, "__file__", None) or BACKEND)
    return _loaded_from


def _load_library(folder: str) -> None:
    """Load the library, so that a plugin that was built elsewhere finds it by its name."""
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


def refuse_native(engine: str) -> None:
    """Raise if verl's checkpoint engine ``engine`` communicates past torch's backends, which FlagCX cannot serve.

    Raises:
        FlagCXError: names the engine, what it uses, and the ways on.
    """
    if engine in NATIVE_ONLY:
        raise FlagCXError(
            f"verl's checkpoint engine {engine!r} communicates through {NATIVE_ONLY[engine]}, and USE_FLAGCX=1 asks "
            "for FlagCX. Take another one (actor_rollout_ref.rollout.checkpoint_engine.backend=naive, nixl or "
            "mooncake), or leave this check out with "
            "VERL_FL_DISABLE=flagcx.checkpoint_engine,flagcx.checkpoint_engine_class,flagcx.stateless_group"
        )


def refuse_stateless() -> None:
    """Raise: verl's stateless groups are vLLM's communicators, which go past torch's backends too.

    Raises:
        FlagCXError: names what they use, and the ways on.
    """
    raise FlagCXError(
        "verl's stateless_init_process_group communicates through NCCL (HCCL on Ascend), and USE_FLAGCX=1 asks for "
        "FlagCX. Take torch's groups, unset USE_FLAGCX, or leave this check out with "
        "VERL_FL_DISABLE=flagcx.stateless_group"
    )


def describe() -> dict[str, Any]:
    """Return where the plugin came from ("" before the first group)."""
    return {"plugin": _loaded_from, "library path": os.environ.get("FLAGCX_PATH", "")}
