"""Whether a model keeps packed sequences apart, tried on the model itself.

Many things can mix them: a mask that is built without positions, a convolution or a recurrent state that runs from one
sequence into the next, attention that sees only a rank's own part of a sequence.  No list of models knows all of them,
so a few tokens are run: a sequence must not change with the one before it, and must change with its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels.sequences import PackedModel

FIRST = 8
"""Tokens of the first of the two sequences."""

PER_RANK = 16
"""Tokens on each rank; the second sequence reaches over all of them."""

LEAK = 0.02
"""Change of an output, relative to its size, that is no rounding."""

TRIES = 3
"""Runs on other tokens, before a difference is believed: an expert that is chosen by a hair may change one run."""


def fault(packed: PackedModel) -> str:
    """Return how ``packed`` mixes sequences or cuts them, "" if it does not.  It runs under ``no_grad``."""
    faults = [found for found, _ in zip(_faults(packed), range(TRIES), strict=False)]
    return faults[0] if all(faults) and len(set(faults)) == 1 else ""


def _faults(packed: PackedModel) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    allowed = _ordinary_tokens(packed.config)
    ends = (0, FIRST, PER_RANK * packed.ranks)
    while True:
        ids = allowed[torch.randint(len(allowed), (1, ends[-1]), generator=generator)]
        others = allowed[torch.randint(len(allowed), (1, ends[-1]), generator=generator)]
        yield _found(packed, ends, ids, others)


def _found(packed: PackedModel, ends: tuple[int, ...], ids: Tensor, others: Tensor) -> str:
    def changed(first: int, end: int) -> Tensor:
        tokens = ids.clone()
        tokens[:, first:end] = torch.where(others[:, first:end] == ids[:, first:end], ids[0, 0], others[:, first:end])
        return _outputs(packed, tokens, ends)

    with torch.no_grad():
        before = _outputs(packed, ids, ends)
        with_another_first = changed(0, FIRST)
        with_another_neighbour = changed(PER_RANK - 1, PER_RANK)
    here = range(packed.rank * PER_RANK, (packed.rank + 1) * PER_RANK)

    def difference(other: Tensor, token: int) -> float | None:
        if token not in here:
            return None
        one, two = (part[:, token - here.start].float() for part in (before, other))
        return float((one - two).norm() / one.norm()) if float(one.norm()) else None

    if (leak := difference(with_another_first, FIRST)) is not None and leak > LEAK:
        return "mixes packed sequences: what it computes for the first token of one changes with the one before it"
    if packed.ranks > 1 and difference(with_another_neighbour, PER_RANK) == 0:
        return "cuts packed sequences: what it computes for a token does not change with the token before it"
    return ""


def _outputs(packed: PackedModel, ids: Tensor, ends: tuple[int, ...]) -> Tensor:
    given: Tensor = packed.forward(ids.to(packed.device), ends)
    return given


def _ordinary_tokens(config: Any) -> Tensor:
    """Return token ids that stand for no image, video or padding."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {
        value
        for each in (config, text)
        for name, value in vars(each).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    return torch.tensor([token for token in range(min(text.vocab_size, 4096)) if token not in special])
