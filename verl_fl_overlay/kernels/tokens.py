"""What is asked of tokens whose logits are known, and what is answered.  Imports no torch, so that hooks can use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


HEAD = "verl_fl_head"
"""The name of the input with which a model is asked a ``Sealed`` question in the place of its logits."""


@dataclass(frozen=True, eq=False)
class TokenQuestion:
    """Logits, and what is asked of them.

    Attributes:
        logits: (..., vocabulary), bf16, fp16, fp32 or fp64, with any strides; None if a model is yet to run, without
            making logits (``HEAD``).  The shapes below are then those of logits that it would make.
        labels: token ids, one for each row of ``logits``, or for each of ``rows``; int32 or int64, in [0, vocabulary).
        temperature: by which logits are divided: a number, or one for each row of ``logits``, fp32 (...); None for 1.
            Numbers below 1e-8 count as 1e-8, as verl has it.
        rows: which rows of the logits, counted as if they were one matrix, the labels belong to, int64 (labels,); the
            other rows are not read, and their gradient is zero.  None: all of them.
        entropy: also ask for the entropy of each row.
        squares: also ask for the sum of the squared probabilities of each row.
        in_place: backward may write the gradient over 16-bit ``logits``.  If other code saved them for its own
            backward, it gets torch's error about a tensor modified in place, never a wrong gradient.
        verl_computes: tells whether verl has a kernel of its own for the log-probs alone.
        idle: settings of verl that have no effect on this answer, by name.
    """

    logits: Tensor | None
    labels: Tensor
    temperature: Tensor | float | None = None
    rows: Tensor | None = None
    entropy: bool = False
    squares: bool = False
    in_place: bool = False
    verl_computes: Callable[[], bool] = lambda: False
    idle: tuple[str, ...] = ()


class Sealed:
    """Carries a question among a model's inputs; in a dataclass FSDP1 would cast the temperature to its 16-bit type."""

    __slots__ = ("question",)

    def __init__(self, question: TokenQuestion) -> None:
        self.question = question


class TokenAnswer(NamedTuple):
    """Log-prob, entropy and sum of squared probabilities of each row; None for what was not asked.

    They have the shape of ``labels`` if there are ``rows``, else of the logits without the last dimension; fp32, or
    fp64 for fp64 logits.  NaN in a row gives NaN.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    squares: Tensor | None = None


class Statistics(NamedTuple):
    """What the kernels write for the rows of a matrix of logits, each (rows,); None for what was not asked.

    With a row's logits z (vocabulary,), divided by the temperature, and its probabilities p = softmax(z):
    ``normalizer`` is n = log(sum(exp(z))), ``log_probs`` is z[label] - n, ``entropy`` is H = -sum(p * log(p)) and
    ``squares`` is S = sum(p ** 2).
    """

    normalizer: Tensor
    log_probs: Tensor
    entropy: Tensor | None = None
    squares: Tensor | None = None

    def part(self, rows: slice | Tensor) -> Statistics:
        """Return these rows, views of them for a slice."""
        return Statistics(*(None if each is None else each[rows] for each in self))


class Upstream(NamedTuple):
    """The gradients of the statistics, each (rows,); None where there is none."""

    log_probs: Tensor | None
    entropy: Tensor | None = None
    squares: Tensor | None = None

    def part(self, rows: slice | Tensor) -> Upstream:
        """Return these rows, views of them for a slice."""
        return Upstream(*(None if each is None else each[rows] for each in self))
