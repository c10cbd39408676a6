"""The events and questions with which hooks reach features: all that the two halves of the overlay share.

A hook (in ``compat``) emits an event and asks a question; a feature subscribes and answers.  A subscriber that fails is
the overlay's fault and not verl's: it is logged once and verl goes on, unless ``VERL_FL_STRICT=1``, which raises.
Settings that turn out impossible always raise.  If an answer fails, verl gets the error, since it waits for the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from verl_fl_overlay.errors import SettingsError

if TYPE_CHECKING:
    from verl_fl_overlay.devices.chips import Chip
    from verl_fl_overlay.kernels.sequences import PackedModel
    from verl_fl_overlay.kernels.tokens import TokenAnswer, TokenQuestion

logger = logging.getLogger("verl_fl_overlay")

P = ParamSpec("P")
T = TypeVar("T")


class Failures:
    """The failures since the overlay was activated: place -> its first error."""

    def __init__(self) -> None:
        self.strict = False
        self._first: dict[str, str] = {}

    def begin(self, strict: bool) -> None:
        """Forget what failed before; from now on a failure raises (``strict``) or is logged once."""
        self.strict = strict
        self._first.clear()

    def told(self) -> dict[str, str]:
        """Return the failures so far."""
        return dict(self._first)

    def record(self, where: str, error: Exception) -> None:
        """Log and keep ``error`` if it is the first one at this place; under VERL_FL_STRICT=1 raise it instead.

        Every rank logs it, so it is a line; the traceback is logged at level DEBUG.
        """
        if self.strict:
            raise error
        if where not in self._first:
            self._first[where] = said = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("%s failed and is skipped (VERL_FL_STRICT=1 raises it): %s", where, said)
            logger.debug("where %s failed:", where, exc_info=error)


class Event:
    """A list of subscribers, called in the order they subscribed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._subscribers: tuple[Callable[..., object], ...] = ()

    def subscribe(self, subscriber: Callable[..., object]) -> Callable[[], None]:
        """Add a subscriber; the returned function removes it."""
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
                whose = getattr(subscriber, "__qualname__", subscriber)
                failures.record(f"{self.name}: {getattr(subscriber, '__module__', '?')}.{whose}", error)


class Question(Generic[P, T]):
    """A question of a hook.  One feature answers while it is on; else verl goes on as if nobody had asked."""

    def __init__(self) -> None:
        self._answer: Callable[P, T | None] | None = None

    def answer(self, answer: Callable[P, T | None]) -> Callable[[], None]:
        """Call ``answer`` for each question from now on; the returned function ends that.

        Raises:
            RuntimeError: somebody answers already; one of the two would silently not be asked.
        """
        if self._answer is not None:
            raise RuntimeError(f"two features answer one question: {self._answer} and {answer}")
        self._answer = answer

        def end() -> None:
            if self._answer is answer:
                self._answer = None

        return end

    def ask(self, *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the answer; None if nobody answers, or if verl is to do the work itself."""
        answer = self._answer  # another thread may end it meanwhile
        return None if answer is None else answer(*args, **kwargs)


@dataclass(frozen=True)
class Engine:
    """An engine of verl, or a worker that has no engine, in torch's terms.

    ``backend`` is what trains: fsdp, megatron, veomni, torchtitan, automodel, or a name that a plugin registered.
    ``models`` are the torch modules that it trains (Megatron has one for each pipeline chunk).  ``optimizer`` steps
    them; it is None for a model that is not trained.  ``mixed_precision`` is the floating type in which it computes,
    "" if verl does not say.  ``legacy`` tells a worker of verl 0.7 from an engine.
    """

    backend: str
    models: tuple[Any, ...] = ()
    optimizer: Any = None
    mixed_precision: str = ""
    legacy: bool = False


failures = Failures()

engine_built = Event("engine built")
"""Emitted with an ``Engine`` that has no model yet, when verl has constructed it."""

engine_initialized = Event("engine initialized")
"""Emitted with an ``Engine``, when verl has built its models and its optimizer."""

rollout_plugin_found = Event("rollout plugin found")
"""Emitted with the package of FlagOS' plugin each time vLLM or SGLang asks for its platform or loads it, before it
reads its settings."""

te_operator_ran = Event("TransformerEngine-FL operator ran")
"""Emitted with TransformerEngine-FL's manager and an operator's name, after the operator was called."""

chip: Question[[], Chip] = Question()
"""Which chip this process trains on, if verl has no platform for it."""

chip_backend: Question[[str], str] = Question()
"""(torch's name for the collectives that verl found) -> the name for that chip."""

flagcx_backend: Question[[], str] = Question()
"""torch's name for FlagCX, if collectives go through it."""

group_backend: Question[[Any], Any] = Question()
"""(backend that verl asked torch for) -> the backend to initialise the process group with."""

group_guard: Question[[str], None] = Question()
"""(name of a guard) -> nothing: asked when torch has initialised its process groups; the guard is put on them."""

past_torch: Question[[str, str, str], None] = Question()
"""(part of verl that bypasses torch's backends, the library it uses instead, the way on): the answer may raise."""

enough_cpus: Question[[float, int, str], None] = Question()
"""(free CPUs of the Ray cluster, workers to start, the way on): the answer raises if there are too few CPUs."""

rollout_engine: Question[[str, str, bool], None] = Question()
"""(package of the engine that rollout is to use, the setting that says so, whether Ray's processes will all run in this
environment): asked before Ray starts; the answer raises if that engine cannot be used."""

runtime_env: Question[[Mapping[str, Any] | None, Mapping[str, str]], dict[str, Any]] = Question()
"""(Ray's runtime environment, variables that workers get from elsewhere) -> the runtime environment to use."""

token_logprobs: Question[[TokenQuestion], TokenAnswer] = Question()
"""Log-probs of tokens, and what else is asked of their logits, as ``kernels.tokens`` says."""

head: Question[[Any, TokenQuestion, int, int], bool] = Question()
"""(transformers' model, what will be asked of its logits, how many rows these would have, the bytes of one logit) ->
whether to give the model the question, by the name ``kernels.tokens.HEAD``; it then makes a part of them at a time."""

packed_attention: Question[..., Any] = Question()
"""(query, key, value, ``Sequences``, ``Form``, sinks or None, whether gradients must be repeatable) -> what each query
sees, as ``kernels.attention.PackedAttention`` says."""

packed_model: Question[[PackedModel], None] = Question()
"""A model that is about to run on packed sequences: the answer raises if it does not keep them apart."""

repeats: Question[[Any, BaseException], bool] = Question()
"""(torch module of the model, what its forward on a micro-batch raised) -> whether to run it once more."""
