"""TransformerEngine-FL and Megatron-LM-FL: told from NVIDIA's packages, their policy made what the environment says.

Both call themselves as NVIDIA's do, and so do their versions; what only they have is a ``plugin`` package inside.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from verl_fl_overlay import packages
from verl_fl_overlay.events import engine_built
from verl_fl_overlay.settings import Settings

logger = logging.getLogger("verl_fl_overlay")

CORE = "transformer_engine.plugin.core"

_told: dict[str, Any] = {}


def installed() -> dict[str, bool]:
    """Return which of the two are here; nothing is imported."""
    return {
        "TransformerEngine-FL": _has("transformer_engine", "plugin", "core", "__init__.py"),
        "Megatron-LM-FL": _has("megatron", "plugin", "decorators.py"),
    }


def _has(package: str, *inside: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, *inside)) for folder in packages.folders(package))


def reason_off(settings: Settings) -> str:
    """Return why there is nothing to do, "" where one of the two is installed."""
    return "" if any(installed().values()) else "neither TransformerEngine-FL nor Megatron-LM-FL is installed"


def start(settings: Settings) -> Callable[[], None]:
    """Act on every Megatron engine that verl builds; call what is returned to stop."""

    def built(engine: Any) -> None:
        if any("megatron" in cls.__module__.lower() for cls in type(engine).__mro__):
            apply(settings)

    return engine_built.subscribe(built)


def apply(settings: Settings) -> None:
    """Have TransformerEngine-FL read its policy anew, note what it became, and warn once if that is not FlagOS."""
    here = installed()
    _told.update(here)
    if here["Megatron-LM-FL"]:
        _told["MG_FL_PREFER"] = settings["MG_FL_PREFER"] or "the device's vendor"
    if here["TransformerEngine-FL"]:
        core = importlib.import_module(CORE)
        core.reset_global_policy()  # it was cached, if anything asked before the environment was complete
        _told["policy"] = _policy(core.get_policy())
        try:
            _told["implementations"] = _implementations(core)
        finally:
            _warn(settings)


def _policy(policy: Any) -> dict[str, Any]:
    return {
        "prefer": policy.prefer,
        "allow_vendors": sorted(policy.allow_vendors or ()),
        "deny_vendors": sorted(policy.deny_vendors),
        "per_op": {op: list(order) for op, order in policy.per_op_order},
        "another implementation is tried when one fails": os.environ.get("TE_FL_STRICT", "1") != "0",
    }


def _implementations(core: Any) -> dict[str, int] | None:
    """Return for how many operators each kind has an implementation here: {"flagos": 7, "vendor:CUDA": 109 ...}.

    None where this TransformerEngine-FL does not tell.
    """
    manager = core.get_default_manager() if hasattr(core, "get_default_manager") else None
    snapshot = getattr(getattr(manager, "registry", None), "snapshot", None)
    if manager is None or snapshot is None:
        return None
    with _own_database():
        manager.ensure_initialized()
    counted: Counter[str] = Counter()
    for implementations in snapshot().impls_by_op.values():
        kinds = {f"{i.kind.value}:{i.vendor}" if i.kind.value == "vendor" else i.kind.value for i in implementations}
        counted.update(kinds)
    return dict(counted)


def _own_database() -> contextlib.AbstractContextManager[object]:
    """Return in what TransformerEngine-FL may import FlagGems, which reads once, then, where its database is."""
    if "flag_gems" in sys.modules or not packages.installed("flag_gems"):
        return contextlib.nullcontext()
    from verl_fl_overlay.flaggems.database import own_database

    return own_database()


def _warn(settings: Settings) -> None:
    prefer = _told["policy"]["prefer"]
    counted = _told.get("implementations")
    here = {prefer} if counted is None else {kind.partition(":")[0] for kind in counted}
    given = settings.given.get("TE_FL_PREFER")
    if "warned" in _told or (given is not None and settings["TE_FL_PREFER"] == "flagos" and prefer in here):
        return
    _told["warned"] = True
    if prefer in here:
        logger.warning(
            "a Megatron engine starts with %s, and TransformerEngine-FL takes %s implementations first; "
            "export TE_FL_PREFER=flagos to be sure of those of FlagOS",
            f"TE_FL_PREFER={given}" if given is not None else "TE_FL_PREFER not set",
            prefer,
        )
    else:
        logger.warning(
            "TransformerEngine-FL is to take %s implementations first and has none here: a Megatron engine runs on %s; "
            "FlagOS' need flag_gems and a device that it knows",
            prefer,
            ", ".join(sorted(here)) or "nothing",
        )


def describe() -> dict[str, Any]:
    """Return what is installed, and the policy of the last Megatron engine that was built."""
    told = {**installed(), **_told}
    told.pop("warned", None)
    module = sys.modules.get("transformer_engine_torch")
    if module is not None:
        told["backend"] = type(module).__name__
    return told
