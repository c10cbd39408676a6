"""Where verl's engines ask for the log-probs of tokens."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from verl_fl_overlay.errors import HookError
from verl_fl_overlay.events import failures, token_logprobs
from verl_fl_overlay.hooks import Call, Hook, Wrapper

FLAGS = ("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", "NPU_CROSS_ENTROPY_LOSS_AVAILABLE")
"""verl's flags (the first is misspelt there) for whether it has flash-attn's kernel, and torch_npu's."""

CONSUMERS = {
    "fsdp": ("verl.workers.engine.fsdp.transformer_impl", True, ""),
    "torchtitan": ("verl.workers.engine.torchtitan.transformer_impl", True, "torchtitan"),
    "automodel": ("verl.workers.engine.automodel.transformer_impl", True, "nemo_automodel"),
    "prefix_grouper": ("verl.trainer.ppo.prefix_grouper_utils", False, "prefix_grouper"),
    "legacy_actor": ("verl.workers.actor.dp_actor", False, ""),
}
"""Caller of the function -> its module, the default for computing in place, the package that the module needs.

In place is verl's default.  The legacy actor and the prefix grouper also compute the entropy from the same logits.
"""


def _wrapper(in_place_by_default: bool) -> Wrapper:
    def logprobs(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(*args, **kwargs)
        in_place = in_place_by_default if call.inplace_backward is None else bool(call.inplace_backward)
        found = token_logprobs.ask(call.logits, call.labels, in_place, _verl_has_a_kernel)
        return wrapped(*args, **kwargs) if found is None else found

    return logprobs


class _Call(NamedTuple):
    """The arguments of verl's function."""

    logits: Any
    labels: Any
    inplace_backward: bool | None = None


def _verl_has_a_kernel() -> bool:
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


def logprobs_hook(consumer: str) -> Hook:
    """Return the hook on the name ``logprobs_from_logits`` in the module of ``consumer`` (a key of ``CONSUMERS``)."""
    module, in_place_by_default, needs = CONSUMERS[consumer]
    return Hook(
        name=f"logprobs.{consumer}",
        module=module,
        attribute="logprobs_from_logits",
        wrapper=_wrapper(in_place_by_default),
        feature="logprobs",
        required=False,
        why="without flash-attn and torch_npu, verl computes log-probs one row at a time, rounded to the logits' type; "
        "they are computed all at once, in fp32.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/torch_functional.py#L73",
        until="verl computes log-probs in fp32 without a loop where flash-attn is missing",
        needs=needs,
        relies_on=tuple(f"verl.utils.torch_functional:{flag}" for flag in FLAGS),
    )
