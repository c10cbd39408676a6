"""Packed sequences in plain terms: where each lies, which tokens see which, and a model that is to run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # hooks make these, and they load no torch
    from torch import Tensor

ANY = -1
"""A side of a window without a limit."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences lie in a batch without padding.

    ``ends_q`` and ``ends_k`` are int32 of (sequences + 1,) on the device of the tokens: 0, then the end of each
    sequence, as flash-attn's ``cu_seqlens``.  Sequence i has the queries ``ends_q[i]`` to ``ends_q[i + 1]`` and the
    keys ``ends_k[i]`` to ``ends_k[i + 1]``; it may be empty.  ``longest_q`` and ``longest_k`` are the lengths of the
    longest one, or more.
    """

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class Form:
    """How a query sees keys; the same for all heads and sequences of a call.

    A query at position i of m sees the key at position j of n of its own sequence.  Let ``d = j - (i + n - m)``: the
    last query is beside the last key, as in flash-attn.  It sees the key if ``d <= 0`` where ``causal``, and if
    ``-window[0] <= d <= window[1]``, where ``ANY`` is no limit.  A query that sees no key gets 0.  Its score is
    ``scale * query . key``, then ``softcap * tanh(score / softcap)`` unless ``softcap`` is 0.
    """

    scale: float
    causal: bool = True
    window: tuple[int, int] = (ANY, ANY)
    softcap: float = 0.0


@dataclass(frozen=True)
class PackedModel:
    """A model that is about to run on packed sequences.

    ``model`` is the torch module that has the configuration ``config``.  ``forward`` runs it on token ids (1, tokens)
    and on their cumulative lengths as ints, and returns what it gives for the tokens of this rank; (1, tokens / ranks,
    outputs).  The sequences are spread over ``ranks`` ranks, of which this is number ``rank``.  ``attention`` is the
    name of the model's attention, and ``told`` whether the model is given the lengths.
    """

    model: Any
    config: Any
    device: Any
    forward: Callable[[Any, tuple[int, ...]], Any]
    attention: str
    told: bool
    rank: int = 0
    ranks: int = 1
