"""Every environment variable of the FlagOS stack: its meaning, its conflicts, and which other processes get it."""

from verl_fl_overlay.settings.table import TABLE, VARIABLES, Settings

__all__ = ["TABLE", "VARIABLES", "Settings"]
