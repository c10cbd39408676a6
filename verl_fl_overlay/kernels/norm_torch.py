"""What a norm computes, with torch's operators: it names the variant that a model has, and gives second gradients."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """In what norms differ.

    Attributes:
        offset: what is added to the weight, 1 where a model keeps how far the weight is from 1.
        centred: the mean is subtracted first, as in a layer norm.
        rounds: the normalised values are rounded to their type before they are multiplied by the weight.
    """

    offset: float = 0.0
    centred: bool = False
    rounds: bool = False


VARIANTS = tuple(Variant(*each) for each in itertools.product((0.0, 1.0), (False, True), (False, True)))


def norm(values: Tensor, weight: Tensor | None, epsilon: float, variant: Variant) -> Tensor:
    """Return ``(x - m) / sqrt(mean((x - m) ** 2) + epsilon) * (weight + offset)`` for each row x of ``values``.

    Args:
        values: (..., size), of any floating type, which is also the result's.
        weight: (size,), of any floating type; None for no product.
        epsilon: is added to the mean of the squares.
        variant: m is the row's mean if the norm is centred, else 0.
    """
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    if variant.centred:
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    if variant.rounds:
        exact = exact.to(values.dtype).to(exact.dtype)
    if weight is not None:
        exact = exact * (weight.to(exact.dtype) + variant.offset)
    return exact.to(values.dtype)
