"""The token log-prob kernels alone: time against the bytes they must move, memory, and error against float64.

python benchmarks/logprobs.py [--rows 16384] [--vocabulary 151936] [--json FILE]; on a CPU a small case is run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from verl_fl_overlay.kernels.agreement import Agreement
from verl_fl_overlay.kernels.logprobs import TokenLogprobs
from verl_fl_overlay.kernels.tokens import TokenQuestion

computer = TokenLogprobs(Agreement())


def token_logprobs(*asked: Any, **more: Any) -> torch.Tensor:
    """Return the log-probs of these logits and labels."""
    return computer(TokenQuestion(*asked, **more)).log_probs


REPEATS = 20


def milliseconds(run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the median time of ``run``, by device events where there is a device; ``before`` is not timed."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        before()
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def error_in_float64(logits: torch.Tensor, labels: torch.Tensor, rows: int = 256) -> dict[str, float]:
    """Return the relative errors, in norm, of log-probs and gradient on the first ``rows`` rows."""
    part, labels = logits[:rows].detach().clone(), labels[:rows]
    exact = part.double().requires_grad_()
    expected = torch.log_softmax(exact, -1).gather(-1, labels[:, None])[:, 0]
    upstream = torch.randn(len(labels), device=part.device)
    (gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    errors = {}
    for dtype in (part.dtype, torch.float32):
        leaf = part.clone().to(dtype).requires_grad_()
        result = token_logprobs(leaf * 1, labels, in_place=True)
        (found,) = torch.autograd.grad(result, leaf, upstream)
        name = str(dtype).removeprefix("torch.")
        errors[f"log-prob, {name} logits"] = _off(result, expected)
        errors[f"gradient, {name} logits"] = _off(found, gradient)
    return errors


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def measure(rows: int, vocabulary: int, device: str) -> dict[str, Any]:
    """Run everything on (rows, vocabulary) bf16 logits."""
    torch.manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    for part in logits.split(1024):
        part.copy_(torch.randn(part.shape, device=device) * 4)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    upstream = torch.randn(rows, device=device)
    errors = error_in_float64(logits, labels, min(rows, 256))
    gigabytes = logits.numel() * logits.element_size() / 1e9

    original = torch.empty_like(logits)
    copy = milliseconds(lambda: original.copy_(logits))
    with torch.no_grad():
        forward = milliseconds(lambda: token_logprobs(logits, labels))
    leaf = logits.requires_grad_()
    times: dict[bool, float] = {}
    extra = None
    for in_place in (False, True):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def both(in_place: bool = in_place) -> None:
            torch.autograd.grad(token_logprobs(leaf, labels, in_place=in_place), leaf, upstream)

        times[in_place] = milliseconds(both, before=lambda: leaf.data.copy_(original))
        if device == "cuda" and in_place:
            extra = (torch.cuda.max_memory_allocated() - before) / 1e9
    bandwidth = 2 * gigabytes / copy  # terabytes a second: gigabytes a millisecond
    return {
        "shape": [rows, vocabulary],
        "kernels": computer.used,
        "logits GB": gigabytes,
        "copy ms": copy,
        "copy TB/s": bandwidth,
        "forward ms": forward,
        "forward over reading once": forward / (gigabytes / bandwidth),
        "forward + backward ms": times[True],
        "forward + backward, not in place, ms": times[False],
        # Forward does not know the upstream gradient, so backward has to read the logits again before it writes.
        "bytes it must move, GB: read, read again, write": 3 * gigabytes,
        "forward + backward, of the time those bytes take": times[True] / (3 * gigabytes / bandwidth),
        "forward + backward, of the time of one read and one write": times[True] / (2 * gigabytes / bandwidth),
        "extra memory GB": extra,
        "relative errors": errors,
    }


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384 if device == "cuda" else 64)
    parser.add_argument("--vocabulary", type=int, default=151936 if device == "cuda" else 4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.rows, options.vocabulary, device)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
