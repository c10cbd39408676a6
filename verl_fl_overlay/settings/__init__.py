"""Every environment variable of the FlagOS stack: what it means, what contradicts it, and who else is given it."""

from verl_fl_overlay.settings.table import TABLE, VARIABLES, Settings

__all__ = ["TABLE", "VARIABLES", "Settings"]
