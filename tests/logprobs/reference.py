"""The reference of the log-prob tests: torch's log_softmax in float64, forward and backward."""

from __future__ import annotations

import torch


def random_case(shape, dtype, device="cpu", seed=0, spread=6.0):
    """Return logits, labels and an upstream gradient with some zeros (masked tokens), fresh for each seed."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    upstream = torch.randn(shape[:-1], generator=generator) * (torch.rand(shape[:-1], generator=generator) > 0.3)
    return logits.to(device), labels.to(device), upstream.to(device)


def expected(logits, labels, upstream):
    """Return log-probs and the gradient of the logits in float64, on the CPU."""
    (result, _, _), gradient = expected_statistics(logits, labels, 1.0, (upstream, None, None))
    return result, gradient


def expected_statistics(logits, labels, temperature, upstream):
    """Return log-probs, entropy and sum of squares, and the gradient of the logits, in float64, on the CPU.

    ``upstream`` are the gradients of the three, None for those that no loss uses.
    """
    exact = logits.detach().cpu().double().requires_grad_()
    logs = torch.log_softmax(exact / torch.as_tensor(temperature, dtype=torch.float64, device="cpu").unsqueeze(-1), -1)
    log_probs = logs.gather(-1, labels.cpu().long().unsqueeze(-1)).squeeze(-1)
    entropy = -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0)).sum(-1)
    found = log_probs, entropy, logs.exp().square().sum(-1)
    sum(
        (one * above.cpu().double()).sum() for one, above in zip(found, upstream, strict=True) if above is not None
    ).backward()
    return tuple(each.detach() for each in found), exact.grad


def relative_error(found, exact):
    """Return the norm of the difference over the norm of the exact tensor; NaN stays NaN."""
    difference = (found.detach().cpu().double() - exact).norm()
    return float(difference / exact.norm().clamp(min=1e-300))
