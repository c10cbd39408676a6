"""Whether a model keeps packed sequences apart, tried on the model itself.

Many things can mix them: a mask that is built without positions, a convolution or a recurrent state that runs from one
sequence into the next, attention that sees only a rank's own part of a sequence.  No list of models knows all of them,
so a few tokens are run: a sequence must not change with the one before it, and must change with its own tokens.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels.sequences import PackedModel

LENGTHS = (7, 8, 7, 8, 7)
"""Lengths of the first sequences: three of them are changed, and each is followed by one that must not change.

The last of these three, the sixth sequence, begins on the first rank and reaches over all of them.
"""

PER_RANK = 48
"""Tokens on each rank."""

LEAK, LEAK_IN_FP32 = 1e-3, 1e-5
"""Change of an output, relative to its size, that is no rounding of a kernel that got other tokens beside it."""

NOISE = 10
"""As many times the change that comes with later tokens, which must not matter, is no rounding either."""


def fault(packed: PackedModel) -> str:
    """Return how ``packed`` mixes sequences or cuts them, "" if it does not.

    It runs under ``no_grad``, three times (four if a sequence is spread over ranks): as often on each rank, since the
    ranks exchange weights and tokens as they go.
    """
    text = packed.config.get_text_config() if hasattr(packed.config, "get_text_config") else packed.config
    if (chunk := getattr(text, "attention_chunk_size", None)) and "flash" not in str(text._attn_implementation):
        return f"cuts packed sequences: its attention starts anew every {chunk} tokens of the batch, not of a sequence"
    allowed, generator = _ordinary_tokens(packed.config, text), torch.Generator().manual_seed(0)
    last = PER_RANK * packed.ranks
    ids, others = (allowed[torch.randint(len(allowed), (1, last), generator=generator)] for _ in range(2))
    others = torch.where(others == ids, allowed[0], others)
    ends = (*accumulate(LENGTHS, initial=0), last)
    changed, followers = list(pairwise(ends))[::2], ends[1::2]

    def outputs(*places: tuple[int, int]) -> Tensor:
        tokens = ids.clone()
        for first, end in places:
            tokens[:, first:end] = others[:, first:end]
        return packed.forward(tokens.to(packed.device), ends)

    def change(other: Tensor, token: int) -> float:
        one, two = (part[:, token].float() for part in (before, other))
        return float((one - two).norm() / one.norm()) if float(one.norm()) else 0.0

    with torch.no_grad():
        before, earlier, later = outputs(), outputs(*changed), outputs((followers[-1] + 1, last))
        neighbour = outputs((PER_RANK - 1, PER_RANK)) if packed.ranks > 1 else before
    # An expert that is chosen by a hair may change one of three, so all three have to.
    if packed.rank == 0:
        least = LEAK_IN_FP32 if before.dtype == torch.float32 else LEAK
        noise = max(NOISE * change(later, token) for token in followers)
        if all(change(earlier, token) > max(least, noise) for token in followers):
            return "mixes packed sequences: what it computes for the first token of one changes with the one before it"
    if packed.rank == 1 and torch.equal(before[:, 0], neighbour[:, 0]):
        return "cuts packed sequences: what it computes for a token does not change with the token before it"
    return ""


def _ordinary_tokens(*configs: Any) -> Tensor:
    """Return token ids that stand for no image, video or padding; the last configuration has the vocabulary."""
    special = {
        value
        for each in configs
        for name, value in vars(each).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    return torch.tensor([token for token in range(min(configs[-1].vocab_size, 4096)) if token not in special])
