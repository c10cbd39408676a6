"""Attention over packed sequences, on the fastest backend of this chip that computes the right numbers.

Padding is a third to a half of what an RL batch computes, and more of its attention.  Packed, the sequences lie one
after another, and attention gets their ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_fl_overlay.errors import AttentionInputError
from verl_fl_overlay.kernels import attention_torch
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, can_be_checked
from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences
from verl_fl_overlay.kernels.triton import LARGEST_HEAD
from verl_fl_overlay.packages import installed

Attend = Callable[..., Tensor]
"""Called with (query, key, value, sequences, form, sinks), as ``attention_torch.one_at_a_time``."""

MOST_TOKENS = 2**31 - 1
"""Ends of sequences are int32."""


class Problem(NamedTuple):
    """All that decides whether a backend can compute, and computes right."""

    device: torch.device
    dtype: torch.dtype
    size: int
    value_size: int
    heads_per_key: int
    causal: bool
    window: tuple[bool, bool]
    softcap: float
    sinks: bool
    deterministic: bool

    def __str__(self) -> str:
        parts = [self.device.type, str(self.dtype).removeprefix("torch."), f"heads of {self.size}"]
        parts += [f"values of {self.value_size}"] if self.value_size != self.size else []
        parts += ["causal" if self.causal else "not causal"]
        told = {
            "window": any(self.window),
            "soft cap": self.softcap,
            "sinks": self.sinks,
            "repeatable": self.deterministic,
        }
        return ", ".join([*parts, *(name for name, true in told.items() if true)])


@dataclass(frozen=True)
class Backend:
    """A way to compute.  ``declines`` returns why it does not take a problem, "" if it does; ``load`` imports it."""

    name: str
    declines: Callable[[Problem], str]
    load: Callable[[], Attend]
    checked: bool = True


def _flash_declines(problem: Problem) -> str:
    if problem.device.type != "cuda":
        return f"it is for CUDA and ROCm, not for {problem.device.type}"
    if problem.dtype not in attention_torch.FLASH_DTYPES:
        return f"it takes bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.size % 8 or max(problem.size, problem.value_size) > attention_torch.FLASH_LARGEST:
        return f"it takes head sizes that are multiples of 8, up to {attention_torch.FLASH_LARGEST}, not {problem.size}"
    if problem.value_size != problem.size:
        return f"it takes values of the size of the keys, not {problem.value_size} beside {problem.size}"
    lacks = [name for name, asked in {"soft cap": problem.softcap, "sinks": problem.sinks}.items() if asked]
    if lacks:
        return f"it has no {' and no '.join(lacks)}"
    if problem.deterministic:
        return "its backward adds up in no fixed order unless torch.use_deterministic_algorithms is on"
    return ""


def _triton_declines(problem: Problem) -> str:
    if not can_be_checked(problem.dtype, problem.device):
        return f"there are no kernels for {str(problem.dtype).removeprefix('torch.')} on {problem.device.type}"
    if not installed("triton"):
        return "triton is not installed"
    if max(problem.size, problem.value_size) > LARGEST_HEAD:
        return f"it takes head sizes up to {LARGEST_HEAD}, not {problem.size}"
    return ""


def _triton() -> Attend:
    from verl_fl_overlay.kernels.triton.attention import attend

    return attend


BACKENDS = (
    Backend("torch's FlashAttention", _flash_declines, lambda: attention_torch.flash),
    Backend("Triton", _triton_declines, _triton),
    Backend("SDPA, one sequence at a time", lambda problem: "", lambda: attention_torch.one_at_a_time, checked=False),
)
"""The fastest first; the last one takes everything."""


class PackedAttention:
    """Attends, with the first backend that takes a problem and agrees with SDPA in fp32 on it.

    Attributes:
        used: problem -> the backend that computes it, with the reasons why none before it does.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.used: dict[str, str] = {}
        self._agreement = agreement
        self._chosen: dict[Problem, Attend] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        form: Form,
        sinks: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Return what each query sees.  Arguments and result as in ``attention_torch.one_at_a_time``.

        ``deterministic`` asks for gradients that are the same bit for bit in every run.

        Raises:
            AttentionInputError: sizes that do not belong together, or more tokens than int32 counts.
        """
        _refuse_misfits(query, key, value, sinks)
        problem = Problem(
            query.device,
            query.dtype,
            query.shape[2],
            value.shape[2],
            query.shape[1] // key.shape[1],
            form.causal,
            (form.window[0] != ANY, form.window[1] != ANY),
            form.softcap,
            sinks is not None,
            deterministic and torch.is_grad_enabled() and not torch.are_deterministic_algorithms_enabled(),
        )
        attend = self._chosen.get(problem) or self._choose(problem, form)
        return attend(query, key, value, sequences, form, sinks)

    def _choose(self, problem: Problem, form: Form) -> Attend:
        reasons = []
        for backend in BACKENDS:
            reason = backend.declines(problem)
            if not reason and backend.checked:
                key = ("attention", type(self), problem.dtype, backend.name, problem)
                reason = self._agreement.reason(key, problem.device, _pair, backend, problem, form)
            if not reason:
                break
            reasons.append(f"{backend.name}: {reason}")
        self.used[str(problem)] = backend.name + (f" ({'; '.join(reasons)})" if reasons else "")
        self._chosen[problem] = attend = backend.load()
        return attend


def _refuse_misfits(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    if not query.dim() == key.dim() == value.dim() == 3 or key.shape[:2] != value.shape[:2]:
        raise AttentionInputError(
            "attention needs (tokens, heads, size) of queries, keys and values, as many values as keys; found "
            f"{_shapes(query, key, value)}"
        )
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise AttentionInputError(
            "queries and keys need one head size, and the queries a multiple of the keys' heads; found "
            f"{_shapes(query, key, value)}"
        )
    if max(query.shape[0], key.shape[0]) > MOST_TOKENS:
        raise AttentionInputError(f"{query.shape[0]} tokens are more than int32 counts: make the micro-batch smaller")
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise AttentionInputError(
            f"there are {sinks.numel()} sinks and {query.shape[1]} heads; a model with sinks cannot spread its heads "
            "over ranks: set ulysses_sequence_parallel_size=1"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


LENGTHS = (1, 130, 67, 0, 258)
"""Lengths of the sequences of a check: a token alone, none, and more than a block of any kernel."""


def _pair(samples: Samples, backend: Backend, problem: Problem, form: Form) -> Pair:
    """Make queries, keys and values, and what computes on them: SDPA in fp32, and the backend.

    A row of what is compared is a head: single tokens may have a gradient of 0, beside which any rounding is large.
    The numbers have no mean, since in a query's gradient that of the keys cancels, and leaves their rounding.
    """
    heads, tokens = 2 * problem.heads_per_key, sum(LENGTHS)
    ends = torch.tensor([0, *LENGTHS], device=problem.device).cumsum(0).to(torch.int32)
    sequences = Sequences(ends, ends, max(LENGTHS), max(LENGTHS))
    left, right = (side if side == ANY else min(side, 40) for side in form.window)
    form = replace(form, window=(left, right))
    scales = torch.tensor([(0.5, 1.0, 2.0)[index % 3] for index in range(heads)]).unsqueeze(1)
    query, key, value = (
        samples.normal(count, tokens * size)
        for count, size in ((heads, problem.size), (2, problem.size), (2, problem.value_size))
    )
    sinks = (samples.normal(1, heads),) if problem.sinks else ()

    def computed(attend: Attend, wide: bool, *given: Tensor) -> tuple[Tensor, ...]:
        parts = [row.view(-1, tokens, row.shape[1] // tokens).transpose(0, 1) for row in given[:3]]
        parts = [part.float() for part in parts] if wide else parts
        attended = attend(*parts, sequences, form, given[3].view(-1) if problem.sinks else None)
        return (attended.transpose(0, 1).reshape(heads, -1).to(problem.dtype),)

    expected: Any = partial(computed, attention_torch.one_at_a_time, True)
    return (scales * query, key, value, *sinks), expected, partial(computed, backend.load(), False)
