"""The reference of the attention tests: float64, one sequence and one head at a time, from the words of ``Form``."""

from __future__ import annotations

from itertools import pairwise

import torch

from verl_fl_overlay.kernels.sequences import ANY, Sequences


def packed(lengths_q, lengths_k=None, device="cpu"):
    """Return sequences of these lengths, one after the other."""

    def ends(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

    lengths_k = lengths_q if lengths_k is None else lengths_k
    return Sequences(ends(lengths_q), ends(lengths_k), max(lengths_q, default=0), max(lengths_k, default=0))


def random_case(tokens_q, tokens_k, heads, kv_heads, size, size_v=None, dtype=torch.float32, seed=0, device="cpu"):
    """Return query, key, value and an upstream gradient, fresh for each seed."""
    generator = torch.Generator().manual_seed(seed)
    size_v = size_v or size
    shapes = (
        (tokens_q, heads, size),
        (tokens_k, kv_heads, size),
        (tokens_k, kv_heads, size_v),
        (tokens_q, heads, size_v),
    )
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def visible(queries, keys, form):
    """Return (queries, keys) of whether a query sees a key."""
    d = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + keys - queries)
    seen = d <= 0 if form.causal else d == d
    for side, distance in zip(form.window, (-d, d), strict=True):
        seen = seen if side == ANY else seen & (distance <= side)
    return seen


def one_head(query, key, value, form, sink=None):
    """Return the attention of one head of one sequence: (m, size), (n, size) and (n, size of a value), a number."""
    scores = form.scale * query @ key.T
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.masked_fill(~visible(len(query), len(key), form), -torch.inf)
    sees = scores.isfinite().any(1)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(len(query), 1)], 1)
    rows = torch.softmax(scores[sees], 1)[:, : len(key)] @ value
    return query.new_zeros(len(query), value.shape[1]).masked_scatter(sees[:, None], rows)


def expected(query, key, value, upstream, sequences, form, sinks=None):
    """Return the attention and the gradients of query, key, value and sinks in float64, on the CPU."""
    leaves = [each.detach().cpu().double().requires_grad_() for each in (query, key, value, sinks) if each is not None]
    q, k, v, *sink = leaves
    group = q.shape[1] // k.shape[1]
    ends = list(zip(sequences.ends_q.tolist(), sequences.ends_k.tolist(), strict=True))
    heads = []
    for head in range(q.shape[1]):
        parts = [
            one_head(
                q[from_q:to_q, head],
                k[from_k:to_k, head // group],
                v[from_k:to_k, head // group],
                form,
                sink[0][head] if sink else None,
            )
            for (from_q, from_k), (to_q, to_k) in pairwise(ends)
        ]
        heads.append(torch.cat([*parts, q.new_zeros(len(q) - ends[-1][0], v.shape[2])]))
    result = torch.stack(heads, 1)
    gradients = torch.autograd.grad(result, leaves, upstream.detach().cpu().double(), allow_unused=True)
    return result.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))


def error(found, exact):
    """Return the norm of the difference over the norm of the exact tensor; of the difference alone where that is 0."""
    difference = (found.detach().cpu().double() - exact).norm()
    norm = exact.norm()
    return float(difference / norm) if norm else float(difference)
