"""Attention over packed sequences in plain torch, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences


def attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, form: Form, sinks: Tensor | None = None
) -> Tensor:
    """Return (t, h, size of a value) for ``query`` (t, h, d), ``key`` and ``value`` (t, groups of h, size)."""
    out = value.new_zeros(*query.shape[:2], value.shape[2])
    ends_q, ends_k = sequences.ends_q.tolist(), sequences.ends_k.tolist()
    parts = [out[:0]]
    for q, to_q, k, to_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        parts.append(_one(query[q:to_q], key[k:to_k], value[k:to_k], form, sinks))
    return torch.cat([*parts, out[ends_q[-1] :]])


def _one(query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None) -> Tensor:
    (m, heads, _), n = query.shape, len(key)
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1).float() for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    apart = torch.arange(n, device=query.device) - torch.arange(n - m, n, device=query.device)[:, None]
    seen = torch.ones_like(apart, dtype=torch.bool)
    if form.causal:
        seen &= apart <= 0
    if form.window[0] != ANY:
        seen &= apart >= -form.window[0]
    if form.window[1] != ANY:
        seen &= apart <= form.window[1]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(heads, m, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num()[..., :n]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
