"""Moments of a training process that features subscribe to, and the one place where their failures are handled.

Hooks (in ``compat``) emit; features subscribe.  A subscriber that fails is the overlay's fault and not verl's: it is
logged once and verl goes on, unless ``VERL_FL_STRICT=1``, which raises.  Settings that turn out impossible always
raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from verl_fl_overlay.errors import SettingsError

logger = logging.getLogger("verl_fl_overlay")

_strict = False
_failures: dict[str, str] = {}


def set_strict(strict: bool) -> None:
    """Choose whether a failing subscriber raises (True) or is logged once (False)."""
    global _strict
    _strict = strict


def failures() -> dict[str, str]:
    """Return what failed so far: subscriber -> its first error."""
    return dict(_failures)


class Event:
    """A list of subscribers, called in the order they subscribed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._subscribers: tuple[Callable[..., object], ...] = ()

    def subscribe(self, subscriber: Callable[..., object]) -> Callable[[], None]:
        """Add a subscriber; call what is returned to take it away again."""
        self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            self._subscribers = tuple(s for s in self._subscribers if s is not subscriber)

        return unsubscribe

    def emit(self, *args: Any) -> None:
        """Call every subscriber with ``args``."""
        for subscriber in self._subscribers:
            try:
                subscriber(*args)
            except SettingsError:
                raise  # the user asked for something that cannot be: going on natively would hide it
            except Exception as error:
                if _strict:
                    raise
                self._record(subscriber, error)

    def _record(self, subscriber: Callable[..., object], error: Exception) -> None:
        key = f"{self.name}: {getattr(subscriber, '__module__', '?')}.{getattr(subscriber, '__qualname__', subscriber)}"
        if key not in _failures:
            _failures[key] = f"{type(error).__name__}: {error}"
            logger.warning("%s failed and is skipped (VERL_FL_STRICT=1 raises it instead)", key, exc_info=error)


engine_built = Event("engine built")
"""Emitted with the engine, or the worker that does without one, before it has a model."""

engine_initialized = Event("engine initialized")
"""Emitted with the engine, or what holds a worker's ``module`` and ``optimizer``, when verl has built these."""

rollout_plugin_found = Event("rollout plugin found")
"""Emitted each time vLLM asks vllm-plugin-FL for its platform, before the plugin has read its settings."""
