"""Statistics of a matrix of logits with torch's operators, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from verl_fl_overlay.kernels.tokens import Statistics, Upstream

CHUNK = 1 << 22
"""Most logits that are held in fp32 at a time: 16 MiB of them."""


def forward(logits: Tensor, labels: Tensor, inverse: Tensor | None, result: Statistics) -> None:
    """Write the statistics of each row, as ``Statistics`` defines them.

    Args:
        logits: (rows, vocabulary).
        labels: (rows,), in [0, vocabulary); zeros are written for a row whose label is negative.
        inverse: (rows,), 1 / temperature; None for 1.
        result: fp32 or fp64, written.
    """
    for rows in _chunks(logits):
        values = _scaled(logits[rows], inverse, rows, result.normalizer.dtype)
        label, skipped = labels[rows].long().unsqueeze(-1), labels[rows] < 0
        # The largest logit is subtracted first, so that the log-prob of a nearly certain token keeps its digits.
        largest = values.amax(-1, keepdim=True)
        picked = values.gather(-1, label.clamp_min(0)) - largest
        values -= largest
        exponentials = values.exp()
        total = exponentials.sum(-1, keepdim=True)
        log_sum = total.log()
        found = [largest + log_sum, picked - log_sum]
        if result.entropy is not None:
            # 0 * log(0) is 0: a token that cannot be drawn adds nothing.
            weighted = values.mul_(exponentials).masked_fill_(exponentials == 0, 0)
            found.append(log_sum - weighted.sum(-1, keepdim=True) / total)
        if result.squares is not None:
            found.append(exponentials.square_().sum(-1, keepdim=True) / total.square())
        for to, each in zip((each for each in result if each is not None), found, strict=True):
            to[rows] = each.squeeze(-1).masked_fill_(skipped, 0)


def backward(
    logits: Tensor, labels: Tensor, inverse: Tensor | None, kept: Statistics, upstream: Upstream, gradient: Tensor
) -> None:
    """Write the gradient of the logits.

    With p, H and S as ``Statistics`` defines them, and the gradients d, h and s of the log-prob, the entropy and the
    squares, the gradient of logit i is the sum of these, divided by the temperature::

        d * ((1 if i is the label else 0) - p[i])
        -h * p[i] * (log(p[i]) + H)
        2 * s * p[i] * (p[i] - S)

    Args:
        logits: (rows, vocabulary).
        labels: (rows,); a label outside [0, vocabulary) is that of no column.
        inverse: (rows,), 1 / temperature; None for 1.
        kept: the statistics, from ``forward``.
        upstream: their gradients.
        gradient: (rows, vocabulary), of any floating type, written; may be ``logits`` itself.
    """
    for rows in _chunks(logits):
        mine, above, label = kept.part(rows), upstream.part(rows), labels[rows].long().unsqueeze(-1)
        logs = _scaled(logits[rows], inverse, rows, kept.normalizer.dtype) - mine.normalizer.unsqueeze(-1)
        probabilities = logs.exp()
        change = torch.zeros_like(logs)
        # Nothing depends on a row that is not asked for, whatever its logits hold.
        weights = torch.stack([_column(each, kept) for each in above if each is not None])
        idle = (weights == 0).all(0) & mine.normalizer.unsqueeze(-1).isfinite()
        if above.log_probs is not None:
            scale = _column(above.log_probs, kept)
            change -= probabilities * scale
            here = (label >= 0) & (label < logits.shape[-1])
            change.scatter_add_(-1, label * here, scale * here)
        if above.entropy is not None and mine.entropy is not None:
            slope = _column(above.entropy, kept)
            of_entropy = logs.add_(mine.entropy.unsqueeze(-1)).mul_(probabilities).mul_(slope)
            change -= of_entropy.masked_fill_((probabilities == 0) | (slope == 0), 0)
        if above.squares is not None and mine.squares is not None:
            change += 2 * _column(above.squares, kept) * probabilities * (probabilities - mine.squares.unsqueeze(-1))
        if inverse is not None:
            change *= inverse[rows].unsqueeze(-1)
        gradient[rows] = change.masked_fill_(idle, 0).to(gradient.dtype)


def _scaled(logits: Tensor, inverse: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return a new matrix of the logits in ``dtype``, divided by the temperature."""
    values = logits.to(dtype, copy=True)
    return values if inverse is None else values.mul_(inverse[rows].unsqueeze(-1))


def _column(values: Tensor, kept: Statistics) -> Tensor:
    return values.to(kept.normalizer.dtype).unsqueeze(-1)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits.shape
    step = max(1, CHUNK // vocabulary) if vocabulary else 1
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
