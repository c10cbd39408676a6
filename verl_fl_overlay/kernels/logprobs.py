"""Log-probs of tokens, and the entropy of what they were drawn from, in fp32, forward and backward, on any device.

The logits are read once for all of it.  No second copy of 16-bit logits is needed: forward keeps a number or two per
token, and backward writes the gradient over the logits if that is allowed.  On a device with Triton, Triton kernels
compute, after a check that their numbers are right there; on other devices torch's own operators compute.
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
from verl_fl_overlay.kernels.tokens import Statistics, TokenAnswer, TokenQuestion, Upstream

SKIPPED = -1
"""Stands, inside, for the label of a row that nobody asks for."""

COLDEST = 1e-8
"""The lowest temperature by which logits are divided."""


class LogprobsInputError(OverlayError):
    """Logits and labels that do not belong together, or a label that is no token of the vocabulary."""


class TokenLogprobs:
    """Computes log-probs of tokens, with the kernels that agree with torch's operators.

    Attributes:
        used: what computed so far: "device type, logits type, what was asked" -> "triton" or "torch", with the reason.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.used: dict[str, str] = {}
        self._agreement = agreement
        self._kernels: dict[tuple[Any, ...], ModuleType] = {}

    def __call__(self, asked: TokenQuestion) -> TokenAnswer:
        """Return what is asked of the tokens, with gradients to the logits; shapes and types as ``tokens`` says.

        Raises:
            LogprobsInputError: wrong types or sizes, or, on the CPU, a label outside the vocabulary.  On other devices
                the host does not wait for the labels: if torch can, a wrong one raises a device-side assertion, as in
                torch's ``gather``.
        """
        logits, labels, rows = asked.logits, asked.labels.reshape(-1), asked.rows
        assert logits is not None  # the caller has some
        refuse_misfits(asked, logits.shape, logits.dtype)
        kernels = self.kernels(logits.device, logits.dtype, asked)
        if rows is not None:
            labels = labels.new_full((logits.shape[:-1].numel(),), SKIPPED).index_put_((rows,), labels)
        # Other code that computes in fp32, such as verl's distillation, saves a copy of 16-bit logits, but wider
        # logits themselves.
        in_place = asked.in_place and logits.element_size() == 2 and not _overlaps(logits)
        flags = in_place, asked.entropy, asked.squares
        scale = inverse(asked, logits.shape[:-1], logits)
        found = _Tokens.apply(logits, labels, scale, *flags, kernels)
        shape = asked.labels.shape if rows is not None else logits.shape[:-1]
        return TokenAnswer(*(None if each is None else _picked(each, rows).view(shape) for each in found))

    def kernels(self, device: torch.device, dtype: torch.dtype, asked: TokenQuestion) -> ModuleType:
        """Return the module whose ``forward`` and ``backward`` compute this: Triton's if it is right, else torch's."""
        flags = asked.temperature is not None, asked.entropy, asked.squares
        key = device, dtype, flags
        return self._kernels.get(key) or self._choose(*key)

    def _choose(self, device: torch.device, dtype: torch.dtype, flags: tuple[bool, bool, bool]) -> ModuleType:
        chosen: ModuleType = logprobs_torch
        name = "torch"
        if can_be_checked(dtype, device):
            if reason := self._agreement.reason(("log-probs", type(self), dtype, flags), device, _pair, device, *flags):
                name = f"torch ({reason})"
            else:
                from verl_fl_overlay.kernels.triton import logprobs as logprobs_triton

                chosen, name = logprobs_triton, "triton"
        with_what = [what for what, on in zip(("temperature", "entropy", "squares"), flags, strict=True) if on]
        self.used[", ".join((device.type, str(dtype).removeprefix("torch."), *with_what))] = name
        self._kernels[device, dtype, flags] = chosen
        return chosen


def inverse(asked: TokenQuestion, shape: torch.Size, like: Tensor) -> Tensor | None:
    """Return 1 / temperature of each row of logits (*shape, vocabulary), in the type of their statistics; None for 1.

    ``like`` is a tensor of their type, where they are.
    """
    if asked.temperature is None:
        return None
    given = {"dtype": _accumulator(like), "device": like.device}
    if not isinstance(asked.temperature, Tensor):
        return torch.full((shape.numel(),), 1 / max(asked.temperature, COLDEST), **given)
    return asked.temperature.detach().to(**given).clamp(min=COLDEST).reciprocal().expand(shape).reshape(-1).contiguous()


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _picked(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def refuse_misfits(asked: TokenQuestion, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise if what is asked does not fit logits of this shape and type, which need not exist.

    Raises:
        LogprobsInputError: see ``TokenLogprobs``.
    """
    labels, rows = asked.labels, asked.rows
    if not dtype.is_floating_point or labels.dtype not in (torch.int32, torch.int64):
        raise LogprobsInputError(
            f"log-probs need floating-point logits and int32 or int64 labels, not {dtype} and {labels.dtype}"
        )
    needed = shape[:-1].numel() if rows is None else rows.numel()
    if not shape or needed != labels.numel():
        where = f"logits {tuple(shape)}" if rows is None else f"rows {tuple(rows.shape)}"
        raise LogprobsInputError(
            f"{where} have {needed} rows, labels {tuple(labels.shape)} are {labels.numel()}: each row needs one label"
        )
    if isinstance(asked.temperature, Tensor):
        try:
            asked.temperature.expand(shape[:-1])
        except RuntimeError as error:
            raise LogprobsInputError(
                f"temperature {tuple(asked.temperature.shape)} does not fit logits {tuple(shape)}: it must be a "
                "number, or one for each row"
            ) from error
    if labels.numel() == 0:
        return
    vocabulary = shape[-1]
    if vocabulary == 0:
        raise LogprobsInputError(f"logits {tuple(shape)} have no vocabulary")
    inside = ((labels >= 0) & (labels < vocabulary)).all()
    if labels.device.type != "cpu":
        with contextlib.suppress(NotImplementedError):  # a chip whose torch has no such assertion
            torch._assert_async(inside, f"a label is outside the vocabulary [0, {vocabulary})")
    elif not inside:
        raise LogprobsInputError(
            f"labels must be in [0, {vocabulary}), found {int(labels.min())} to {int(labels.max())}: "
            "mask padding (-100) in the loss, not in the labels"
        )


class _Tokens(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        inverse: Tensor | None,
        in_place: bool,
        entropy: bool,
        squares: bool,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        labels = labels.contiguous()  # without this a column of a matrix keeps its stride
        kept = empty_statistics(labels.numel(), _accumulator(logits), logits.device, entropy, squares)
        for rows, part in _matrices(logits):
            kernels.forward(part, labels[rows], None if inverse is None else inverse[rows], kept.part(rows))
        ctx.save_for_backward(logits, labels, inverse, kept.normalizer, kept.entropy, kept.squares)
        ctx.in_place, ctx.kernels = in_place, kernels
        ctx.set_materialize_grads(False)  # what no loss uses costs nothing
        return kept.log_probs, kept.entropy, kept.squares

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, inverse, normalizer, entropy, squares = ctx.saved_tensors
        unneeded = (None,) * 6
        if all(each is None for each in upstream):
            return None, *unneeded
        kept = Statistics(normalizer, normalizer, entropy, squares)
        above = Upstream(*(None if each is None else each.contiguous() for each in upstream))
        gradient = (
            logits.detach() if ctx.in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        for rows, part in _matrices(logits):
            target = part.detach() if ctx.in_place else gradient.view(-1, logits.shape[-1])[rows]
            scale = None if inverse is None else inverse[rows]
            ctx.kernels.backward(part, labels[rows], scale, kept.part(rows), above.part(rows), target)
        if ctx.in_place:
            torch.autograd.graph.increment_version(gradient)  # torch does not see what a Triton kernel writes
        return gradient, *unneeded


def empty_statistics(
    rows: int, dtype: torch.dtype, device: torch.device, entropy: bool, squares: bool = False
) -> Statistics:
    """Return statistics of so many rows, to be written."""
    made = (torch.empty(rows, dtype=dtype, device=device) if on else None for on in (True, True, entropy, squares))
    return Statistics(*made)


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


def _pair(samples: Samples, device: torch.device, scaled: bool, entropy: bool, squares: bool) -> Pair:
    from verl_fl_overlay.kernels.triton import logprobs as logprobs_triton

    # In the first rows all tokens are about equally likely, in the last only two are.  The kernels take 4,096 logits at
    # a time: the second block is not full, and it holds a label and the largest logit of some rows.
    logits = samples.rows((0.1, 1, 4, 30, 8), 5000)
    labels = torch.tensor([3, 4999, int(logits[2].argmax()), int(logits[3].topk(2).indices[1]), 4096], device=device)
    logits[1, 4998], logits[4, 4096] = logits[1].max() + 2, logits[4].max()
    colder = torch.tensor([1.0, 0.7, 1.3, 2.5, 0.9], device=device) if scaled else None

    def computed(kernels: ModuleType) -> Run:
        # Each number is compared as one row.  The gradient is written over a copy of the logits, as in training.
        def run(logits: Tensor) -> tuple[Tensor, ...]:
            found = _Tokens.apply(logits * 1, labels, colder, True, entropy, squares, kernels)
            return tuple(each.unsqueeze(-1) for each in found if each is not None)

        return run

    return (logits,), computed(logprobs_torch), computed(logprobs_triton)
