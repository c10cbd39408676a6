"""What torch can do with a function that the kernels cannot: transforms of it, and gradients of its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of torch (vmap, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def goes_by_torch(upstream: Tensor) -> bool:
    """Whether the backward of this gradient has to run on torch's operators.

    torch enables gradients in a backward only if its result is to be differentiated (``create_graph=True``), and runs
    one backward for several upstream gradients as a transform, an old one (``is_grads_batched=True``) or a new one.
    """
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(upstream)


def gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input, None where none is needed, as torch's operators compute it.

    Args:
        function: computes with torch's operators what the kernel computes.
        upstream: the gradient of ``function(*inputs)``.
        inputs: as the backward's context gives them; None stands for an input that is not there.
    """
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(*inputs), wanted, upstream, create_graph=differentiated))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in inputs)
