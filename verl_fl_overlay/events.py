"""What hooks tell features and what they ask them: the only words that the two halves of the overlay share.

A hook (in ``compat``) emits an event and asks a question; a feature subscribes and answers.  A subscriber that fails is
the overlay's fault and not verl's: it is logged once and verl goes on, unless ``VERL_FL_STRICT=1``, which raises.
Settings that turn out impossible always raise.  An answer that fails is raised to verl, which waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from verl_fl_overlay.errors import SettingsError

logger = logging.getLogger("verl_fl_overlay")

P = ParamSpec("P")
T = TypeVar("T")

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


class Question(Generic[P, T]):
    """What a hook wants to know.  One feature answers while it is on; else verl goes on as if nobody had asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._answer: Callable[P, T | None] | None = None

    def answer(self, answer: Callable[P, T | None]) -> Callable[[], None]:
        """Have ``answer`` called from now on; call what is returned to end that."""
        self._answer = answer

        def end() -> None:
            if self._answer is answer:
                self._answer = None

        return end

    def ask(self, *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the answer; None where nobody answers, or where the answer is that verl does it itself."""
        return None if self._answer is None else self._answer(*args, **kwargs)


@dataclass(frozen=True)
class Engine:
    """An engine of verl, or a worker that does without one, in torch's terms.

    ``backend`` is what trains: fsdp, megatron, veomni, torchtitan or automodel.  ``models`` are the torch modules that
    it trains (Megatron has one for each pipeline chunk), ``optimizer`` is what steps them, None for a model that is
    only asked.  ``mixed_precision`` is the floating type in which it computes, "" where verl does not say.
    """

    backend: str
    models: tuple[Any, ...] = ()
    optimizer: Any = None
    mixed_precision: str = ""


engine_built = Event("engine built")
"""Emitted with an ``Engine`` that has no model yet, when verl has constructed it."""

engine_initialized = Event("engine initialized")
"""Emitted with an ``Engine``, when verl has built its models and its optimizer."""

rollout_plugin_found = Event("rollout plugin found")
"""Emitted each time vLLM asks vllm-plugin-FL for its platform, before the plugin has read its settings."""

token_logprobs: Question[[Any, Any, bool], Any] = Question("token log-probs")
"""(logits, labels, whether the gradient may be written over the logits) -> log-probs, as ``kernels.logprobs`` says."""
