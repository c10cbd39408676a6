"""Token log-probs of a matrix of logits with torch's operators, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK = 1 << 22
"""Most logits that are held in fp32 at a time: 16 MiB of them."""


def forward(logits: Tensor, labels: Tensor, result: Tensor, normalizer: Tensor) -> None:
    """Write each row's log-prob ``logits[label] - n`` and its log-sum-exp ``n = log(sum(exp(logits)))``.

    Args:
        logits: (rows, vocabulary).
        labels: (rows,), in [0, vocabulary).
        result: (rows,), fp32 or fp64, written.
        normalizer: like ``result``, written; what ``backward`` needs.
    """
    for rows in _chunks(logits):
        values = logits[rows].to(result.dtype)
        largest = values.amax(-1, keepdim=True)
        # The largest logit is subtracted first, so that the log-prob of a nearly certain token keeps its digits.
        log_sum = (values - largest).exp_().sum(-1, keepdim=True).log_()
        picked = values.gather(-1, labels[rows].long().unsqueeze(-1))
        result[rows] = (picked - largest - log_sum).squeeze(-1)
        normalizer[rows] = (largest + log_sum).squeeze(-1)


def backward(logits: Tensor, labels: Tensor, normalizer: Tensor, upstream: Tensor, gradient: Tensor) -> None:
    """Write the gradient of the logits, ``upstream * (one_hot(label) - softmax(logits))``.

    Args:
        logits: (rows, vocabulary).
        labels: (rows,).
        normalizer: (rows,), from ``forward``.
        upstream: (rows,), the gradient of the log-probs.
        gradient: (rows, vocabulary), of any floating type, written; may be ``logits`` itself.
    """
    for rows in _chunks(logits):
        scale = upstream[rows].to(normalizer.dtype).unsqueeze(-1)
        values = (logits[rows].to(normalizer.dtype) - normalizer[rows].unsqueeze(-1)).exp_().mul_(-scale)
        values.scatter_add_(-1, labels[rows].long().unsqueeze(-1), scale)
        gradient[rows] = values.to(gradient.dtype)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits.shape
    step = max(1, CHUNK // vocabulary) if vocabulary else 1
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
