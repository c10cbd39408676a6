"""Gradients that have gradients themselves (``create_graph=True``), which the kernels' backwards do not give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def differentiable(
    function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input, None where none is needed, as torch's operators compute it.

    For a backward that finds gradients enabled: torch enables them there only if the result is to be differentiated.

    Args:
        function: computes with torch's operators what the kernel computes.
        upstream: the gradient of ``function(*inputs)``.
        inputs: as the backward's context gives them; None stands for an input that is not there.
    """
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, upstream, create_graph=True))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in inputs)
