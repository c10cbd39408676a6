"""Rotary position embeddings: where they are found, the kernel in their place, and the native code for the check.

A rotation of neighbours instead of halves, a rotation of a part of the head, and a backward rotation look alike.  The
samples tell them apart.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from verl_fl_overlay.kernels.agreement import Agreement, Pair, Samples, kernels_take

NAME = "apply_rotary_pos_emb"
"""The name of the function in the file of each Hugging Face model."""


def files(model: Any) -> Iterator[ModuleType]:
    """Yield the files that define classes of the model and their own rotary function, if nobody has replaced it."""
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        function = getattr(sys.modules.get(name), NAME, None)
        if function is None or function.__module__ != name:  # already replaced, by us or by others
            continue
        if list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]:
            yield sys.modules[name]


def in_place_of(native: Callable[..., Any], agreement: Agreement) -> Callable[..., Any]:
    """Return the replacement for a model file's own ``apply_rotary_pos_emb(q, k, cos, sin)``.

    It rotates q (batch, heads, length, size) and k by cos and sin (batch or 1, length, size).  Native code computes
    calls with other broadcasting, and calls that need a gradient to cos or sin.
    """
    from verl_fl_overlay.kernels.triton.rotary import rotate

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        if not torch.compiler.is_compiling() and not rest and not more and _fit(q, k, cos, sin):
            # The kernel is compiled for the number of heads, their size, and whether all rows share the angles.
            sizes = q.shape[1], k.shape[1], q.shape[3], cos.shape[0] == 1
            if agreement.agree(("rotary", native, q.dtype, sizes), q.device, _pair, native, rotate, *sizes):
                return rotate(q, k, cos, sin)
        return native(q, k, cos, sin, *rest, **more)

    return apply_rotary_pos_emb


def _fit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel takes these shapes and this type, and computes all gradients that are needed."""
    if not (q.dim() == k.dim() == 4 and q.dtype == k.dtype == cos.dtype == sin.dtype and kernels_take(q, k, cos, sin)):
        return False
    batch, _, *token = q.shape
    alike = [k.shape[0], *k.shape[2:]] == [batch, *token] and cos.shape == sin.shape
    return alike and list(cos.shape) in ([batch, *token], [1, *token]) and not (cos.requires_grad or sin.requires_grad)


def _pair(
    samples: Samples,
    function: Callable[..., Any],
    kernel: Callable[..., Any],
    q_heads: int,
    k_heads: int,
    size: int,
    shared: bool,
) -> Pair:
    def native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(q, k, cos.detach(), sin.detach()))

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(kernel(q, k, cos.detach(), sin.detach()))

    # Real angles have equal halves, the normal numbers do not: each of the two shows errors that the other hides.
    positions = torch.tensor([[0.0, 1, 7, 1000], [3, 2, 90, 30000]][: 1 if shared else 2])
    half = positions[..., None] / 10000 ** (torch.arange(size // 2) / (size // 2))
    angles = torch.cat([half, half], -1)
    cos, sin = (torch.cat([of(angles), samples.normal(len(positions), 2, size)], 1) for of in (torch.cos, torch.sin))
    q, k = (samples.rows((1, 30), heads, 6, size) for heads in (q_heads, k_heads))
    return (q, k, cos, sin), native, fused
