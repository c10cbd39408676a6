"""What the overlay raises.

None of these is an ImportError: verl wraps several of its imports in ``except ImportError`` and would swallow it.
"""


class OverlayError(RuntimeError):
    """Base of every error that the overlay raises itself; verl's own errors are never wrapped in one."""


class SettingsError(OverlayError):
    """The environment variables contradict each other or hold values that are not allowed; lists all of them."""


class UnsupportedVerlError(OverlayError):
    """The verl that is here is older than the overlay supports, or differs from every release it was written for."""


class HookError(OverlayError):
    """A hook could not be put on its target, although the target's module was imported."""


class FlagCXError(OverlayError):
    """FlagCX was asked for, and its plugin or library is not there, does not load, or cannot serve what verl asks."""
