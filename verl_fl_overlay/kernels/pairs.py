"""How rotary embeddings differ: which elements are a pair, where the turned pair goes, which angles it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pair i is the elements ``i * step`` and ``i * step + apart``."""

    step: int
    apart: int


class Layout(NamedTuple):
    """One way to rotate a part of each head; the elements outside of this part stay as they are.

    Attributes:
        start: the first element of the rotated part.
        number: how many pairs it has.
        source: the pairs of a head as it comes.
        result: the pairs of the rotated head.
        angles: the pairs of a row of cos or sin; ``apart`` is 0 where both elements of a pair have one angle.
        sections: the first pairs that turn by a token's second and third position (its row and column in an image);
            both are ``number`` where a token has one position.
    """

    start: int
    number: int
    source: Pairs
    result: Pairs
    angles: Pairs
    sections: tuple[int, int]


NEIGHBOURS = Pairs(2, 1)
"""Elements 0 and 1, 2 and 3, and so on."""

ONE_ANGLE = Pairs(1, 0)
"""Both elements of pair i have the angle at i."""


def layouts(size: int, width: int, sections: Sequence[int] | None) -> Iterator[Layout]:
    """Yield the layouts that the kernel has for heads of ``size`` elements and ``width`` angles for each token.

    Args:
        size: elements of a head.
        width: elements of a row of cos.
        sections: the numbers of pairs that turn by each of three positions; None if a token has one position.
    """
    for number in (width // 2, width):  # each element has an angle, or each pair has one
        if not width <= 2 * number <= size or (sections and (len(sections) != 3 or sum(sections) != number)):
            continue
        halves = Pairs(1, number)
        ends = (sections[0], sections[0] + sections[1]) if sections else (number, number)
        for start in {0, size - 2 * number}:
            for source, result in ((halves, halves), (NEIGHBOURS, NEIGHBOURS), (NEIGHBOURS, halves)):
                if 2 * number == width:
                    yield Layout(start, number, source, result, result, ends)
                yield Layout(start, number, source, result, ONE_ANGLE, ends)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, layout: Layout, back: bool = False) -> Tensor:
    """Return what the kernel computes, by torch's operators, in the type of heads.

    Args:
        heads: (batch, heads, length, size).
        cos: (batch or 1, length, width); (3, batch or 1, length, width) where a token has three positions.
        sin: like ``cos``.
        layout: what is rotated.
        back: heads are gradients of rotated heads; return those of the heads.
    """
    pair = torch.arange(layout.number, device=heads.device)
    position = sum((pair >= end).long() for end in layout.sections)

    def elements(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return pair * pairs.step, pair * pairs.step + pairs.apart

    (c1, c2), (s1, s2) = (
        [of.reshape(-1, *of.shape[-3:])[position, :, :, at].movedim(0, -1)[:, None] for at in elements(layout.angles)]
        for of in (cos, sin)
    )
    source, result_pairs = layout.source, layout.result
    if back:
        (s1, s2), (source, result_pairs) = (-s2, -s1), (result_pairs, source)
    x1, x2 = (heads[..., layout.start + at] for at in elements(source))
    result = heads.clone()
    first, second = elements(result_pairs)
    result[..., layout.start + first] = (x1 * c1 - x2 * s1).to(heads.dtype)
    result[..., layout.start + second] = (x2 * c2 + x1 * s2).to(heads.dtype)
    return result
