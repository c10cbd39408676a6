"""How many layers may keep their activations in the memory that is left: measured in training, decided at each forward.

A micro-batch of t tokens in which k layers keep their activations needs about

    max(base, base / t0 * t) + k * cost * t    bytes more than what is allocated when it begins.

``base`` is the most that an update took more while all layers recomputed, t0 the tokens of its largest micro-batch, and
``cost`` what a layer keeps for each token.  This must fit into what is available, less a reserve.

The first update warms up, the second one measures ``base``; from then on at most 1, 4, 16 ... layers keep theirs, and
each of these updates measures ``cost`` again.  So a wrong measurement of one layer is not multiplied by all of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from verl_fl_overlay.kernels.recompute import Layers

RESERVE_ALONE, RESERVE = 1 / 16, 1 / 8
"""The part of the device that stays free, for fragments and for what does not grow with the tokens.

It is larger where several ranks train.  They exchange data inside layers, maybe with different tokens (expert
parallelism), so the same layers must recompute on all of them.  The number is that for the largest micro-batch so far,
and a larger one does not change it.  A process that trains alone decides for each micro-batch by its own tokens.

Nothing is kept for a rollout in the same process group.  It takes its memory back between updates: these leave no
activations, and verl empties torch's cache before.  What it holds during an update is not available, and not counted.
"""

MEASURED, GROWTH = 2, 4
"""The update that measures ``base``, and how many times as many layers each later one may take as the one before."""


class Memory(Protocol):
    """What tells of a device's memory, in bytes; ``devices.memory.DeviceMemory`` is one."""

    def allocated(self) -> int:
        """Return what tensors of this process hold."""

    def peak(self) -> int:
        """Return the most that they held since ``restart_peak``."""

    def restart_peak(self) -> None:
        """Look for the peak anew."""

    def available(self) -> int:
        """Return what this process can still allocate."""

    def total(self) -> int:
        """Return what the device has."""


def ranks() -> int:
    """Return how many ranks train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def lowest(numbers: Tensor) -> list[float]:
    """Return for each number the lowest of all ranks, which all call this."""
    if ranks() > 1:
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
    found: list[float] = numbers.tolist()
    return found


class MemoryBudget:
    """Lets as many layers of one model keep their activations as the memory holds; begins with none."""

    def __init__(self, layers: Layers, memory: Memory) -> None:
        self._layers, self._memory = layers, memory
        self._alone = ranks() == 1
        self._updates = self._begin = 0
        self._inside = self._gave_up = False
        self._tokens = self._most_tokens = 0
        self._base = self._per_token = self._cost = 0.0
        self._agreed = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._span, self._span_begin = ExitStack(), 0

    def decide(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Switch the layers for a forward of ``model`` with these inputs; nothing is done if it does not train."""
        if not (model.training and torch.is_grad_enabled()):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor):
            return  # how many tokens these are cannot be told
        self._tokens = ids.numel()
        if not self._inside:
            self._begin_update(ids.device)
        self._most_tokens = max(self._most_tokens, self._tokens)
        self._keep(self._affordable())

    def end_update(self) -> None:
        """Take note that verl has finished an update, maybe of another model."""
        if self._inside and self._updates == MEASURED:
            self._base = float(self._memory.peak() - self._begin)
            self._per_token = self._base / max(1, self._most_tokens)
        self._inside = False

    def give_up(self) -> bool:
        """Let all layers recompute from now on; return whether any of them had kept its activations."""
        kept = self._layers.kept > 0
        self._gave_up = self._gave_up or kept
        self._keep(0)
        return kept

    def describe(self) -> dict[str, Any]:
        """Return what was measured, in JSON's types; 0 where nothing was yet."""
        room, base, _, cost, _ = self._agreed
        return {
            "updates": self._updates,
            "MB available, less the reserve": _megabytes(room),
            "MB of an update, all layers recomputing": _megabytes(base or self._base),
            "MB that a layer keeps of 1,000 tokens": _megabytes(1000 * (cost or self._cost)),
            "gave up": self._gave_up,
        }

    def _begin_update(self, device: torch.device) -> None:
        self._inside = True
        self._updates += 1
        if self._updates == MEASURED:
            self._most_tokens, self._begin = 0, self._memory.allocated()
            self._memory.restart_peak()
        elif self._updates > MEASURED:
            reserve = (RESERVE_ALONE if self._alone else RESERVE) * self._memory.total()
            room = 0.0 if self._gave_up else self._memory.available() - reserve
            greatest = (self._base, self._per_token, self._cost, self._most_tokens)
            room, *negative = lowest(torch.tensor([room, *(-each for each in greatest)], device=device))
            base, per_token, cost, most_tokens = (-each for each in negative)
            self._agreed = room, base, per_token, cost, most_tokens

    def _affordable(self) -> int:
        """Return how many layers may keep their activations in this micro-batch."""
        if self._updates <= MEASURED or (self._gave_up and self._alone):
            return 0
        room, base, per_token, cost, most_tokens = self._agreed
        tokens = max(1, self._tokens if self._alone else most_tokens)
        needed = max(base, per_token * tokens)
        if not cost:  # what one layer keeps is a part of the base, since each recomputes in its turn
            return int(room > 2 * needed)
        fitting = int((room - needed) / (cost * tokens))
        most = int(GROWTH ** (self._updates - MEASURED - 1)) if self._updates < 10 else fitting
        return max(0, min(fitting, most, len(self._layers)))

    def _keep(self, count: int) -> None:
        if count == self._layers.kept:
            return
        self._layers.keep(count)
        self._span.close()
        if count:
            first, last = self._layers[-count], self._layers[-1]
            # FSDP2 gathers a layer's weights in its own hooks, and frees them: these are around those.
            self._span.callback(first.register_forward_pre_hook(self._enter_kept, prepend=True).remove)
            self._span.callback(last.register_forward_hook(self._leave_kept).remove)

    def _enter_kept(self, *given: Any) -> None:
        self._span_begin = self._memory.allocated()

    def _leave_kept(self, *given: Any) -> None:
        if torch.is_grad_enabled():
            held = self._memory.allocated() - self._span_begin
            self._cost = max(self._cost, held / (self._layers.kept * max(1, self._tokens)))


def _megabytes(count: float) -> int:
    return round(count / 1e6)
