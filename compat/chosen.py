"""What verl has settled on in this process already, so that a hook comes too late."""

from __future__ import annotations

import sys

PLATFORM = "verl.plugin.platform.platform_manager"


def device() -> bool:
    """Return whether verl has a device."""
    manager = sys.modules.get(PLATFORM)
    if manager is not None:
        # Only a warning hangs on it, so a verl that calls it otherwise is not refused.
        return getattr(manager, "_current_platform", None) is not None
    return "verl.workers.engine.base" in sys.modules  # before 0.9 the engines keep the helpers they found at import


def collectives() -> bool:
    """Return whether verl keeps the name of its collectives, as it does from an import on in 0.7 and 0.8."""
    return "verl.utils.distributed" in sys.modules and PLATFORM not in sys.modules
