"""Whether a model keeps packed sequences apart, tried on the model itself.

Many things can mix them: a mask that is built without positions, a convolution or a recurrent state that runs from one
sequence into the next, attention that sees only a rank's own part of a sequence.  No list of models knows all of them,
so a few tokens are run: a sequence must not change with the one before it, must be the same at another place of the
batch, and must change with its own tokens.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels.sequences import PackedModel

LENGTHS = (7, 8, 7, 8, 7)
"""Lengths of the first sequences: three of them are changed, and each is followed by one that must not change.

The last of these three, the sixth sequence, begins on the first rank and reaches over all of them.  The third sequence
holds the tokens of the first.
"""

PER_RANK = 48
"""Tokens on each rank."""

LEAK, LEAK_IN_FP32 = 1e-3, 1e-5
"""Change of an output, relative to its size, that is no rounding of a kernel that got other tokens beside it."""

ELSEWHERE, ELSEWHERE_IN_FP32 = 5e-2, 1e-3
"""Difference of an output at another place of the batch, relative to its size, that is no rounding."""

NOISE = 10
"""As many times the change that comes with later tokens, which must not matter, is no rounding either."""


class NoOutputError(Exception):
    """All outputs are 0, as those of a head that was not trained yet may be."""


def fault(packed: PackedModel) -> str:
    """Return how ``packed`` mixes sequences or cuts them, "" if it does not.

    It runs under ``no_grad``, three times (four if a sequence is spread over ranks): as often on each rank, since the
    ranks exchange weights and tokens as they go.

    Raises:
        NoOutputError: the outputs do not tell.
    """
    text = packed.config.get_text_config() if hasattr(packed.config, "get_text_config") else packed.config
    if (chunk := getattr(text, "attention_chunk_size", None)) and "flash" not in packed.attention:
        return f"cuts packed sequences: its attention starts anew every {chunk} tokens of the batch, not of a sequence"
    allowed, generator = _ordinary_tokens(packed, text), torch.Generator().manual_seed(0)
    last = PER_RANK * packed.ranks
    ids, others = (allowed[torch.randint(len(allowed), (1, last), generator=generator)] for _ in range(2))
    others = torch.where(others == ids, allowed[0], others)
    ends = (*accumulate(LENGTHS, initial=0), last)
    changed, followers = list(pairwise(ends))[::2], ends[1::2]
    (one, end), (again, _) = changed[:2]
    ids[:, again : again + end - one] = ids[:, one:end]

    def outputs(*places: tuple[int, int]) -> Tensor:
        tokens = ids.clone()
        for first, end in places:
            tokens[:, first:end] = others[:, first:end]
        return packed.forward(tokens.to(packed.device), ends)

    def difference(found: Tensor, expected: Tensor) -> float:
        norm = expected.float().norm()
        return float((found.float() - expected.float()).norm() / norm) if norm else 0.0

    with torch.no_grad():
        # Where verl's fused head gives log-probs, those of a token depend on the next one.
        before, earlier, later = outputs(), outputs(*changed), outputs((followers[-1] + 2, last))
        neighbour = outputs((PER_RANK - 1, PER_RANK)) if packed.ranks > 1 else before
    if not before.any():
        raise NoOutputError("its outputs are all 0")
    wide = before.dtype == torch.float32
    # An expert that is chosen by a hair may change one of three, so all three have to.
    if packed.rank == 0:
        noise = max(NOISE * difference(later[:, token], before[:, token]) for token in followers)
        leaks = [difference(earlier[:, token], before[:, token]) for token in followers]
        if all(leak > max(LEAK_IN_FP32 if wide else LEAK, noise) for leak in leaks):
            return "mixes packed sequences: what it computes for the first token of one changes with the one before it"
        size = end - one - 1
        elsewhere = difference(before[:, again : again + size], before[:, one : one + size])
        if elsewhere > max(ELSEWHERE_IN_FP32 if wide else ELSEWHERE, noise):
            return "mixes packed sequences: what it computes for one changes with its place in the batch"
    if packed.rank == 1 and torch.equal(before[:, 0], neighbour[:, 0]):
        return "cuts packed sequences: what it computes for a token does not change with the token before it"
    return ""


def _ordinary_tokens(packed: PackedModel, text: Any) -> Tensor:
    """Return token ids that stand for no image, video or padding."""
    special = {
        value
        for each in (packed.config, text)
        for name, value in vars(each).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    vocabulary = packed.model.get_input_embeddings().num_embeddings
    return torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special])
