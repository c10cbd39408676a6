"""The Triton kernels of log-probs in Triton's interpreter: each case's errors against float64.

TRITON_INTERPRET=1 python tests/logprobs/interpreted.py prints JSON.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from logprobs.reference import expected_statistics, random_case, relative_error
from verl_fl_overlay.kernels import logprobs_torch
from verl_fl_overlay.kernels.logprobs import _Tokens
from verl_fl_overlay.kernels.triton import logprobs


def run(kernels, logits, labels, scale, upstream):
    """Return the statistics that have an upstream gradient, and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    flags = [each is not None for each in upstream[1:]]
    found = _Tokens.apply(leaf * 1, labels, scale, True, *flags, kernels)
    used = [(one, above) for one, above in zip(found, upstream, strict=True) if above is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return [one.detach() for one, _ in used] + [leaf.grad.double()]


def main() -> None:
    torch.cpu.current_device = lambda: None  # the interpreter has no device
    logprobs.BLOCK = 64
    torch.manual_seed(0)
    told = {}
    for dtype, inverse, entropy, squares, skip in product(
        (torch.float32, torch.float16), (None, "rows"), (False, True), (False, True), (False, True)
    ):
        logits, labels, _ = random_case((7, 150), dtype)
        logits[2, 100:] = float("-inf")
        labels[2] = 5
        scale = torch.rand(7) + 0.5 if inverse else None
        if skip:
            labels[[1, 6]] = -1
        flags = True, entropy, squares
        upstream = [torch.randn(7) if on else None for on in flags]
        for each in filter(lambda each: each is not None, upstream):
            each[3] = 0
            if skip:
                each[[1, 6]] = 0

        case = logits, labels, scale, upstream
        ours = run(logprobs, *case)
        name = f"{dtype}, {inverse}, {entropy}, {squares}, {skip}"
        told[name] = [relative_error(one, other) for one, other in zip(ours, run(logprobs_torch, *case), strict=True)]
        if not skip:
            temperature = 1.0 if scale is None else 1 / scale
            exact, gradient = expected_statistics(logits, labels, temperature, upstream)
            asked = [each for each, above in zip(exact, upstream, strict=True) if above is not None]
            told[name] += [relative_error(one, other) for one, other in zip(ours, [*asked, gradient], strict=True)]
    logits, labels, _ = random_case((3, 150), torch.float32)
    logits[1, 3] = float("nan")
    column = torch.stack([labels, labels + 1000], -1)[:, 0]  # with a stride, and others between that are none
    found = run(logprobs, logits, column, None, [torch.tensor([1.0, 0.0, -2.0])] * 3)
    exact = run(logprobs_torch, logits, labels, None, [torch.tensor([1.0, 0.0, -2.0])] * 3)
    poisoned = [torch.isnan(each).reshape(3, -1).any(-1).tolist() for each in found]
    errors = [relative_error(one[[0, 2]], other[[0, 2]]) for one, other in zip(found, exact, strict=True)]
    print(json.dumps({"cases": told, "poisoned": poisoned, "labels with a stride": errors}))


if __name__ == "__main__":
    main()
