"""Stands in for the flash-attn package in ``benchmarks/realistic.py``, where that package is not installed.

To compare with verl as its users run it, the benchmark needs flash-attn, which has to be compiled for each torch.  This
package has the names that transformers and verl import from it, so that both take it for flash-attn.  The kernels are
torch's own FlashAttention-2, which was taken from that package.  It is put on PYTHONPATH by that benchmark alone, for
the rows that are named after flash-attn, and serves the model there: causal attention, without dropout or soft cap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3+stand.in"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Return the attention of sequences of one length; tensors are (batch, length, heads, head size)."""
    _refuse(dropout_p, softcap, deterministic)
    return _attention(q, k, v, None, None, q.shape[1], k.shape[1], softmax_scale, causal, window_size)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Return the attention of packed sequences, which begin at ``cu_seqlens``; tensors are (tokens, heads, head size).

    A longest length that is a tensor is read from the GPU, for which the host waits: flash-attn does the same.
    """
    _refuse(dropout_p, softcap, deterministic)
    longest = int(max_seqlen_q), int(max_seqlen_k)
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, softmax_scale, causal, window_size)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    """Be a name that transformers imports, and that training does not call."""
    raise NotImplementedError("flash-attn's stand-in has no attention with a cache")


def _refuse(dropout: float, softcap: float, deterministic: bool) -> None:
    if dropout or softcap or deterministic:
        raise NotImplementedError("flash-attn's stand-in has no dropout, no soft cap and no deterministic backward")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    """Call torch's FlashAttention-2; torch knows its backward, and a window of -1 means that there is none."""
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )[0]
