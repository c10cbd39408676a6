"""Where verl's engines ask for the log-probs of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from verl_fl_overlay.compat.packing import SOURCE
from verl_fl_overlay.errors import HookError
from verl_fl_overlay.events import failures, token_logprobs
from verl_fl_overlay.hooks import Call, Hook, Wrapper
from verl_fl_overlay.kernels.tokens import TokenQuestion

LEGACY = "verl.workers.actor.dp_actor"

FLAGS = ("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", "NPU_CROSS_ENTROPY_LOSS_AVAILABLE")
"""verl's flags (the first is misspelt there) for whether it has flash-attn's kernel, and torch_npu's."""

CONSUMERS = {
    "fsdp": ("verl.workers.engine.fsdp.transformer_impl", True, ""),
    "torchtitan": ("verl.workers.engine.torchtitan.transformer_impl", True, "torchtitan"),
    "automodel": ("verl.workers.engine.automodel.transformer_impl", True, "nemo_automodel"),
    "prefix_grouper": ("verl.trainer.ppo.prefix_grouper_utils", False, "prefix_grouper"),
    "legacy_actor": (LEGACY, False, ""),
}
"""Caller of the function -> its module, the default for computing in place, the package that the module needs.

In place is verl's default.  The legacy actor and the prefix grouper also compute the entropy from the same logits.
"""


def _wrapper(in_place_by_default: bool, pairs: Pairs) -> Wrapper:
    def logprobs(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, pair = _Call(*args, **kwargs), pairs.get()
        in_place = in_place_by_default if call.inplace_backward is None else bool(call.inplace_backward)
        asked = TokenQuestion(call.logits, call.labels, in_place=in_place, verl_computes=verl_has_a_kernel)
        if pair is not None:  # then nobody but this computation reads the logits
            asked = replace(asked, entropy=True, in_place=True, idle=pair.idle)
        found = token_logprobs.ask(asked)
        if found is None:
            return wrapped(*args, **kwargs)
        if pair is not None:
            pair.logits, pair.entropy = call.logits, found.entropy
        return found.log_probs

    return logprobs


class _Call(NamedTuple):
    """The arguments of verl's function."""

    logits: Any
    labels: Any
    inplace_backward: bool | None = None


@dataclass
class _Pair:
    """The entropy that was computed with the log-probs of these logits, for verl's next call."""

    idle: tuple[str, ...]
    logits: Any = None
    entropy: Any = None

    def of(self, native: Call) -> Call:
        """Return a function that gives this entropy for these logits, and what ``native`` gives for others."""

        def entropy(logits: Any, *args: Any, **kwargs: Any) -> Any:
            return self.entropy if logits is self.logits else native(logits, *args, **kwargs)

        return entropy


Pairs = ContextVar[_Pair | None]
"""Tells the functions that verl calls one after the other of the pair that they compute together; None outside."""


def _pairs() -> Pairs:
    return ContextVar("the entropy of the logits whose log-probs verl asks for", default=None)


@contextmanager
def _paired(pairs: Pairs, idle: tuple[str, ...]) -> Iterator[_Pair]:
    """Compute entropy with each log-probs that verl asks for inside."""
    token = pairs.set(pair := _Pair(idle))
    try:
        yield pair
    finally:
        pairs.reset(token)


IDLE = ("entropy_checkpointing", "entropy_from_logits_with_chunking")
"""verl's settings for memory that entropy costs, which it does not cost here."""


def idle(config: Any) -> tuple[str, ...]:
    """Return which of ``IDLE`` verl's ``config`` sets."""
    return tuple(name for name in IDLE if getattr(config, name, False))


def _prefix_grouper(pairs: Pairs) -> Wrapper:
    def forward(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        native = kwargs.get("entropy_fn")
        if native is None or not kwargs.get("calculate_entropy"):
            return wrapped(*args, **kwargs)
        with _paired(pairs, ()) as pair:
            return wrapped(*args, **{**kwargs, "entropy_fn": pair.of(native)})

    return forward


def _legacy_actor(pairs: Pairs) -> Wrapper:
    def forward(wrapped: Call, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("calculate_entropy", args[2] if len(args) > 2 else False)
        if not wanted or worker.use_fused_kernels:
            return wrapped(*args, **kwargs)
        config, native = worker.config, worker.compute_entropy_from_logits
        with _paired(pairs, idle(config)) as pair:
            worker.compute_entropy_from_logits = pair.of(native)
            if pair.idle:  # a checkpoint would ask for the entropy again in backward
                worker.config = copy(config)
                object.__setattr__(worker.config, "entropy_checkpointing", False)  # the configuration is frozen
            try:
                return wrapped(*args, **kwargs)
            finally:
                worker.config, worker.compute_entropy_from_logits = config, native

    return forward


def _entropy(pairs: Pairs) -> Wrapper:
    def entropy(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pair = pairs.get()
        return wrapped(*args, **kwargs) if pair is None else pair.of(wrapped)(*args, **kwargs)

    return entropy


def verl_has_a_kernel() -> bool:
    """Whether verl uses flash-attn's or torch_npu's kernel and not a loop over rows; True also if it does not tell."""
    from verl.utils import torch_functional

    try:
        flash_attn, npu = (getattr(torch_functional, flag) for flag in FLAGS)
    except AttributeError as error:
        lost = HookError(
            f"log-probs are computed by verl: {error}, by which it told whether it has a kernel of its own"
        )
        failures.record("the look for verl's kernels for log-probs", lost)
        return True
    return bool(npu or (flash_attn and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"))


def logprobs_hook(consumer: str, pairs: Pairs | None = None) -> Hook:
    """Return the hook on the name ``logprobs_from_logits`` in the module of ``consumer`` (a key of ``CONSUMERS``)."""
    module, in_place_by_default, needs = CONSUMERS[consumer]
    return Hook(
        name=f"logprobs.{consumer}",
        module=module,
        attribute="logprobs_from_logits",
        wrapper=_wrapper(in_place_by_default, pairs or _pairs()),
        feature="logprobs",
        required=False,
        why="without flash-attn and torch_npu, verl computes log-probs one row at a time, rounded to the logits' type; "
        "they are computed all at once, in fp32.",
        upstream=f"{SOURCE}/v0.9.1/verl/utils/torch_functional.py#L73",
        until="verl computes log-probs in fp32 without a loop where flash-attn is missing",
        needs=needs,
        relies_on=tuple(f"verl.utils.torch_functional:{flag}" for flag in FLAGS),
    )


def hooks(consumers: Iterable[str]) -> list[Hook]:
    """Return the hooks on the functions of these consumers (keys of ``CONSUMERS``), and on those that want entropy."""
    pair, pairs = partial(Hook, feature="logprobs", required=False), _pairs()
    own = {
        "prefix_grouper": [
            pair(
                name="entropy.prefix_grouper",
                module=CONSUMERS["prefix_grouper"][0],
                attribute="pg_forward",
                wrapper=_prefix_grouper(pairs),
                why="verl computes log-probs and then the entropy of the same logits; both come from one pass.",
                upstream=f"{SOURCE}/v0.9.1/verl/trainer/ppo/prefix_grouper_utils.py#L103",
                until="verl computes log-probs and entropy in one pass",
                needs="prefix_grouper",
            )
        ],
        "legacy_actor": [
            pair(
                name="entropy.legacy_actor",
                module=LEGACY,
                attribute="DataParallelPPOActor._forward_micro_batch",
                wrapper=_legacy_actor(pairs),
                why="as entropy.prefix_grouper, in verl 0.7's default worker.",
                upstream=f"{SOURCE}/v0.7.1/verl/workers/actor/dp_actor.py",
                until="verl 0.8.0, which has no legacy workers",
                relies_on=tuple(
                    f"{LEGACY}:DataParallelPPOActor.{name}"
                    for name in ("config", "compute_entropy_from_logits", "use_fused_kernels")
                ),
            ),
            pair(
                name="entropy.legacy_padded",
                module="verl.utils.torch_functional",
                attribute="entropy_from_logits",
                wrapper=_entropy(pairs),
                why="verl 0.7's default worker asks this for the entropy of padded logits; it is known already.",
                upstream=f"{SOURCE}/v0.7.1/verl/utils/torch_functional.py",
                until="verl 0.8.0, which has no legacy workers",
            ),
        ],
    }
    return [hook for name in consumers for hook in (logprobs_hook(name, pairs), *own.get(name, ()))]
