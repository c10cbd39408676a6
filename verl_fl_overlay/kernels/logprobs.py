"""Log-probabilities of tokens in fp32, vectorised, in chunks, forward and backward, on any device.

No second copy of 16-bit logits is needed: forward keeps one number per token, and backward writes the gradient over the
logits if that is allowed.  On a device with Triton, Triton kernels compute, after a check that their numbers are right
there; on other devices torch's own operators compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.kernels import logprobs_torch
from verl_fl_overlay.kernels.agreement import Agreement, Pair, Run, Samples, can_be_checked


class LogprobsInputError(OverlayError):
    """Logits and labels that do not belong together, or a label that is no token of the vocabulary."""


class TokenLogprobs:
    """Computes log-probs of tokens, with the kernels that agree with torch's operators.

    Attributes:
        used: what computed so far: "device type, logits type" -> "triton" or "torch", with the reason.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.used: dict[str, str] = {}
        self._agreement = agreement
        self._kernels: dict[tuple[torch.device, torch.dtype], ModuleType] = {}

    def __call__(self, logits: Tensor, labels: Tensor, *, in_place: bool = False) -> Tensor:
        """Return ``log_softmax(logits)[..., label]`` of every token.

        Args:
            logits: (..., vocabulary), bf16, fp16, fp32 or fp64, with any strides.
            labels: token ids, one for each row of ``logits``; int32 or int64, each in [0, vocabulary).
            in_place: let backward write the gradient over 16-bit ``logits``.  If other code saved them for its own
                backward, it gets torch's error about a tensor modified in place, never a wrong gradient.

        Returns:
            Log-probs of shape ``logits.shape[:-1]``: fp32, or fp64 for fp64 logits.  NaN in a row gives NaN.

        Raises:
            LogprobsInputError: wrong types or sizes, or, on the CPU, a label outside the vocabulary.  On other devices
                the host does not wait for the labels: if torch can, a wrong one raises a device-side assertion, as in
                torch's ``gather``.
        """
        _refuse_misfits(logits, labels)
        what = logits.device, logits.dtype
        kernels = self._kernels.get(what) or self._choose(*what)
        # Other code that computes in fp32, such as verl's distillation, saves a copy of 16-bit logits, but wider
        # logits themselves.
        return _apply(logits, labels, in_place and logits.element_size() == 2, kernels)

    def _choose(self, device: torch.device, dtype: torch.dtype) -> ModuleType:
        """Choose who computes on ``device``: Triton if it is there and right, torch otherwise."""
        chosen: ModuleType = logprobs_torch
        name = "torch"
        if can_be_checked(dtype, device):
            if reason := self._agreement.reason(("log-probs", type(self), dtype), device, _pair, device):
                name = f"torch ({reason})"
            else:
                from verl_fl_overlay.kernels.triton import logprobs as logprobs_triton

                chosen, name = logprobs_triton, "triton"
        self.used[f"{device.type}, {str(dtype).removeprefix('torch.')}"] = name
        self._kernels[device, dtype] = chosen
        return chosen


def _apply(logits: Tensor, labels: Tensor, in_place: bool, kernels: ModuleType) -> Tensor:
    result: Tensor = _TokenLogprobs.apply(logits, labels, in_place, kernels)
    return result


def _refuse_misfits(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point() or labels.dtype not in (torch.int32, torch.int64):
        raise LogprobsInputError(
            f"log-probs need floating-point logits and int32 or int64 labels, not {logits.dtype} and {labels.dtype}"
        )
    if logits.dim() == 0 or logits.shape[:-1].numel() != labels.numel():
        raise LogprobsInputError(
            f"logits {tuple(logits.shape)} have {logits.shape[:-1].numel()} rows, labels {tuple(labels.shape)} are "
            f"{labels.numel()}: each row needs one label"
        )
    if labels.numel() == 0:
        return
    vocabulary = logits.shape[-1]
    if vocabulary == 0:
        raise LogprobsInputError(f"logits {tuple(logits.shape)} have no vocabulary")
    inside = ((labels >= 0) & (labels < vocabulary)).all()
    if labels.device.type != "cpu":
        with contextlib.suppress(NotImplementedError):  # a chip whose torch has no such assertion
            torch._assert_async(inside, f"a label is outside the vocabulary [0, {vocabulary})")
    elif not inside:
        raise LogprobsInputError(
            f"labels must be in [0, {vocabulary}), found {int(labels.min())} to {int(labels.max())}: "
            "mask padding (-100) in the loss, not in the labels"
        )


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, in_place: bool, kernels: ModuleType) -> Tensor:
        labels = labels.reshape(-1).contiguous()  # without this a column of a matrix keeps its stride
        accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
        result = torch.empty(labels.numel(), dtype=accumulator, device=logits.device)
        normalizer = torch.empty_like(result)
        for rows, part in _matrices(logits):
            kernels.forward(part, labels[rows], result[rows], normalizer[rows])
        ctx.save_for_backward(logits, labels, normalizer)
        ctx.in_place, ctx.kernels = in_place, kernels
        return result.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, normalizer = ctx.saved_tensors
        upstream = upstream.reshape(-1).contiguous()
        gradient = (
            logits.detach() if ctx.in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        for rows, part in _matrices(logits):
            target = part.detach() if ctx.in_place else gradient.view(-1, logits.shape[-1])[rows]
            ctx.kernels.backward(part, labels[rows], normalizer[rows], upstream[rows], target)
        if ctx.in_place:
            torch.autograd.graph.increment_version(gradient)  # torch does not see what a Triton kernel writes
        return gradient, None, None, None


def _matrices(logits: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits as matrices that are views of them, each with the slice of rows that it covers."""
    if logits.dim() == 2 or logits.is_contiguous():
        matrix = logits if logits.dim() == 2 else logits.view(-1, logits.shape[-1])
        yield slice(first, first + matrix.shape[0]), matrix
        return
    if logits.dim() == 1:
        yield slice(first, first + 1), logits.unsqueeze(0)
        return
    for part in logits.unbind(0):
        yield from _matrices(part, first)
        first += part.shape[:-1].numel()


def _pair(samples: Samples, device: torch.device) -> Pair:
    from verl_fl_overlay.kernels.triton import logprobs as logprobs_triton

    # At the first temperature all tokens are about equally likely, at the last only two are.  The kernels take 4,096
    # logits at a time: the second block is not full, and it holds a label and the largest logit of some rows.
    logits = samples.rows((0.1, 1, 4, 30, 8), 5000)
    labels = torch.tensor([3, 4999, int(logits[2].argmax()), int(logits[3].topk(2).indices[1]), 4096], device=device)
    logits[1, 4998], logits[4, 4096] = logits[1].max() + 2, logits[4].max()

    def computed(kernels: ModuleType) -> Run:
        # Each log-prob is compared as one row.  The gradient is written over a copy of the logits, as in training.
        return lambda logits: (_apply(logits * 1, labels, True, kernels).unsqueeze(-1),)

    return (logits,), computed(logprobs_torch), computed(logprobs_triton)
