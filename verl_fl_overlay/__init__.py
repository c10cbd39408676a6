"""FlagOS for verl, as an overlay of hooks: ``export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay``.

Importing this package activates the overlay as soon as verl is there, which is now when verl itself loads it.
"""

from verl_fl_overlay.activation import activate_with_verl
from verl_fl_overlay.errors import HookError, OverlayError, SettingsError, UnsupportedVerlError

__all__ = ["HookError", "OverlayError", "SettingsError", "UnsupportedVerlError", "__version__"]

__version__ = "0.1.0"

activate_with_verl()
