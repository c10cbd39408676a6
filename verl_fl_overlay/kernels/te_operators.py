"""Trials of TransformerEngine-FL's operators: what each implementation computes, beside the same in fp32.

A trial calls one implementation as TransformerEngine's layers call it, on tokens of very different magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from verl_fl_overlay.kernels.agreement import Samples

ALLOWED = 2**-6
"""Largest distance from fp32, relative to the norm of the output, where the inputs are bf16."""
ALLOWED_FP32 = 2**-14
"""The same where they are fp32."""
TOKENS, WIDTH, OUT, HEADS, ROWS = 24, 64, 48, 4, 2

Operator = Callable[..., Any]


@dataclass(frozen=True)
class Trial:
    """One use of an operator: ``of`` computes with an implementation, ``exact`` gives the same outputs in fp32."""

    operator: str
    name: str
    of: Callable[[Operator], Sequence[Tensor | None]]
    exact: Sequence[Tensor]
    allowed: float = ALLOWED

    def distance(self, implementation: Operator) -> float:
        """Return how far its outputs are from fp32, as a part of what is allowed; infinite for one that is missing."""
        apart = map(_relative, self.of(implementation), self.exact)
        return max(apart) / self.allowed


def _relative(found: Tensor | None, exact: Tensor) -> float:
    if found is None or found.shape != exact.shape:
        return math.inf
    apart = float((found.double() - exact.double()).norm() / exact.double().norm())
    return math.inf if math.isnan(apart) else apart


def trials(device: torch.device, types: Any) -> Iterator[Trial]:
    """Yield the trials on ``device``; ``types`` gives TransformerEngine's name of a torch type."""
    samples = Samples()

    def tokens(width: int) -> Tensor:
        made = samples.rows([10.0 ** (index % 4 - 2) for index in range(TOKENS)], width)
        return made.to(device, torch.bfloat16)

    def normal(*shape: int) -> Tensor:
        return samples.normal(*shape).to(device, torch.bfloat16)

    yield from _norms(tokens(WIDTH), tokens(WIDTH), normal(WIDTH), types[torch.bfloat16])
    for out in (OUT, WIDTH):  # a square weight hides what only its shape would tell
        yield from _products(tokens(WIDTH), tokens(out), normal(out, WIDTH), normal(out), types)
    yield _adam([samples.normal(WIDTH, OUT).to(device) for _ in range(2)])
    yield _attention(*(normal(TOKENS, ROWS, HEADS, 32) for _ in range(4)))


def _norms(x: Tensor, dy: Tensor, weight: Tensor, type_: Any, eps: float = 1e-6) -> Iterator[Trial]:
    """RMSNorm: y = x / rms(x) * w; its backward gets 1 / rms(x)."""
    for centered in (False, True):
        of_x, of_w = (tensor.float().requires_grad_() for tensor in (x, weight))
        inverse = (of_x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = of_x * inverse * (of_w + 1 if centered else of_w)
        y.backward(dy.float())
        told = inverse.detach().squeeze(-1)
        how = ", weights about 0" if centered else ""

        def forward(norm: Operator, centered: bool = centered) -> Sequence[Tensor]:
            y, *_ = norm(x, weight, eps, None, None, type_, 0, centered)
            return (y,)

        def backward(norm: Operator, centered: bool = centered, told: Tensor = told) -> Sequence[Tensor]:
            dx, dw = norm(dy, x, told, weight, 0, centered, eps)
            return dx, dw

        yield Trial("rmsnorm_fwd", f"norm{how}", forward, [y.detach()])
        yield Trial("rmsnorm_bwd", f"norm{how}", backward, [_grad(of_x), _grad(of_w)])


def _products(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, types: Any) -> Iterator[Trial]:
    """A linear layer: y = x W' + b; dx = dy W; dW = dy' x, added in fp32 too; db = sum of dy over the tokens."""
    space = torch.empty(1024, dtype=torch.uint8, device=x.device)

    def product(
        gemm: Operator, a: Tensor, b: Tensor, layout: str, *, with_bias: bool = False, into: Tensor | None = None
    ) -> Sequence[Tensor | None]:
        grad = layout != "TN"
        kind = types[torch.bfloat16 if into is None else into.dtype]
        given = bias if with_bias else None
        transposed = (letter == "T" for letter in layout)
        before = (a, next(transposed), b, next(transposed), into, None, kind, given, types[bias.dtype], False, None)
        into_it = into is not None
        made = gemm(*before, grad, space, len(space), into_it, False, alpha=1.0, beta=1.0 if into_it else 0.0)
        out, bias_grad, *_ = made
        return (out, bias_grad) if grad and with_bias else (out,)

    fx, fdy, fw, fb = (tensor.float() for tensor in (x, dy, weight, bias))
    before = (fdy.T @ fx).flip(0).bfloat16().float()  # as large as what is added, so that a lost one shows
    kind = f" {fw.shape[1]} to {fw.shape[0]}"
    yield Trial("generic_gemm", f"y = x W',{kind}", lambda g: product(g, weight, x, "TN"), [fx @ fw.T])
    yield Trial(
        "generic_gemm", f"y = x W' + b,{kind}", lambda g: product(g, weight, x, "TN", with_bias=True), [fx @ fw.T + fb]
    )
    yield Trial("generic_gemm", f"dx,{kind}", lambda g: product(g, weight, dy, "NN"), [fdy @ fw])
    yield Trial(
        "generic_gemm", f"dW and db,{kind}", lambda g: product(g, x, dy, "NT", with_bias=True), [fdy.T @ fx, fdy.sum(0)]
    )
    added = [fdy.T @ fx + before]
    for type_, how in ((torch.bfloat16, ""), (torch.float32, " fp32")):

        def adding(gemm: Operator, type_: torch.dtype = type_) -> Sequence[Tensor | None]:
            return product(gemm, x, dy, "NT", into=before.to(type_, copy=True))

        yield Trial("generic_gemm", f"dW, added{how},{kind}", adding, added)


def _adam(given: list[Tensor], lr: float = 0.1, eps: float = 1e-3, decay: float = 0.1, step: int = 3) -> Trial:
    """AdamW of fp32 weights: m and v from zero, bias-corrected, weights decayed by lr * decay."""
    gradient, weight = given
    first, second = 0.1 * gradient, 0.05 * gradient.square()
    moved = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + eps)

    def run(adam: Operator) -> Sequence[Tensor]:
        lists = [[gradient.clone()], [weight.clone()], [torch.zeros_like(weight)], [torch.zeros_like(weight)]]
        adam = adam()
        adam(65536, torch.zeros(1, dtype=torch.int, device=weight.device), lists, lr, 0.9, 0.95, eps, step, 1, 1, decay)
        return [moments[0] for moments in lists[1:]]

    return Trial(
        "multi_tensor_adam", "AdamW", run, [weight * (1 - lr * decay) - lr * moved, first, second], ALLOWED_FP32
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Trial:
    """Causal attention over sequences of one length, (tokens, rows, heads, size), and its gradients."""
    exact = [tensor.float().permute(1, 2, 0, 3).detach().requires_grad_() for tensor in (query, key, value)]
    out = scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True)
    out.backward(gradient.float().permute(1, 2, 0, 3))

    def run(attention: Operator) -> Sequence[Tensor]:
        layer = attention()(query.shape[-1] ** -0.5)
        given = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        found = layer(*given, qkv_layout="sbhd_sbhd_sbhd", attn_mask_type="causal", window_size=(-1, 0))
        found = found.view_as(query)
        found.backward(gradient)
        return [found.detach(), *map(_grad, given)]

    wanted = [tensor.permute(2, 0, 1, 3) for tensor in (out.detach(), *map(_grad, exact))]
    return Trial("get_flash_attention_class", "causal", run, wanted)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "backward has run"
    return tensor.grad
