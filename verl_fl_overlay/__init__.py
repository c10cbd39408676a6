"""FlagOS for verl, as an overlay of hooks: ``export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay``.

Importing this package activates the overlay: at once if verl is being imported or is loaded, else with verl's import.
"""

import os

if os.path.isdir(os.path.join(os.path.dirname(__path__[0]), "compat", "pins")):
    __path__.append(os.path.dirname(__path__[0]))  # a checkout has compat/ beside this folder, an installation in it

from verl_fl_overlay.errors import HookError, OverlayError, SettingsError, UnsupportedVerlError
from verl_fl_overlay.packages import installed

if not installed("verl_fl_overlay.compat"):
    raise OverlayError("the folder compat/ is not beside verl_fl_overlay/: copy both, or pip install verl-fl-overlay")

from verl_fl_overlay.activation import activate_with_verl

__all__ = ["HookError", "OverlayError", "SettingsError", "UnsupportedVerlError", "__version__"]

__version__ = "0.1.0"

activate_with_verl()
