"""What verl has already chosen in this process; a hook comes too late to change it."""

from __future__ import annotations

import sys

PLATFORM = "verl.plugin.platform.platform_manager"


def device() -> bool:
    """Return whether verl has chosen its device."""
    manager = sys.modules.get(PLATFORM)
    if manager is not None:
        # Only a warning hangs on it, so a verl that calls it otherwise is not refused.
        return getattr(manager, "_current_platform", None) is not None
    return "verl.workers.engine.base" in sys.modules  # before 0.9 the engines keep the helpers they found at import


def collectives() -> bool:
    """Return whether verl has stored the name of its collectives; 0.7 and 0.8 do so when a module is imported."""
    return "verl.utils.distributed" in sys.modules and PLATFORM not in sys.modules
