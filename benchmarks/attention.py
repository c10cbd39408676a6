"""The Triton attention, torch's flash-attention and SDPA on the same packed sequences, in turns: time, memory, errors.

python benchmarks/attention.py [--tokens 16384] [--rounds 20] [--sweep [KERNEL ...]]

The sequences are as long as those of RL: prompts of 256 to 512 tokens, responses of 900 on average, few of them long.
``--sweep`` instead times each kernel of ours alone with many cuts, those that do not run here included.  On a CPU only
SDPA runs, on something tiny.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from verl_fl_overlay.kernels.sequences import Form, Sequences

SEED, LONGEST, SIGMA, RESPONSE = 0, 4096, 0.8, 900
CUTS = {
    "forward": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))),
    "query_gradient": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))),
    "key_gradient": list(itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3))),
}
"""For each kernel the queries and keys of a block, warps and stages to try."""


def lengths(tokens: int) -> list[int]:
    """Return lengths of prompts with responses that sum to ``tokens``; the last one is cut."""
    draw, found = random.Random(SEED), []
    while sum(found) < tokens:
        response = draw.lognormvariate(math.log(RESPONSE) - SIGMA**2 / 2, SIGMA)
        found.append(min(draw.randint(256, 512) + int(response), LONGEST, tokens - sum(found)))
    return found


def one_at_a_time(ends: list[int], form: Form) -> Callable[..., Tensor]:
    """Return attention by SDPA, which knows no packed sequences."""

    def attend(*tensors: Tensor) -> Tensor:
        parts = []
        for begin, end in pairwise(ends):
            q, k, v = (each[begin:end].transpose(0, 1)[None] for each in tensors)
            found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=form.scale, enable_gqa=True)
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


def flash(sequences: Sequences, form: Form) -> Callable[..., Tensor]:
    """Return torch's own build of FlashAttention-2; its name for packed sequences differs between releases."""
    ends, longest = sequences.ends_q, sequences.longest_q
    options = ends, ends, longest, longest, 0.0, form.causal, False
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(q, k, v, *options, scale=form.scale)[0]


def ours(sequences: Sequences, form: Form) -> Callable[..., Tensor]:
    from verl_fl_overlay.kernels.triton.attention import attend

    return lambda q, k, v: attend(q, k, v, sequences, form)


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the time of one run: between events of the device, where there is one."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begun)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def both(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the result and the gradients."""
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def compare(rows: dict[str, Callable[..., Tensor]], leaves: list[Tensor], upstream: Tensor, rounds: int) -> None:
    """Print each row's median times, its peak memory, and what it is of the first row's; rows take turns."""
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, float] = {}
    for number in range(rounds + 3):  # the first three compile and warm up
        for row, attend in rows.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with torch.no_grad():
                forward = milliseconds(lambda attend=attend: attend(*leaves))
            whole = milliseconds(lambda attend=attend: both(attend, leaves, upstream))
            if torch.cuda.is_available():
                peaks[row] = (torch.cuda.max_memory_allocated() - before) / 1e6
            if number >= 3:
                times.setdefault((row, "forward"), []).append(forward)
                times.setdefault((row, "whole"), []).append(whole)
    medians = {key: statistics.median(found) for key, found in times.items()}
    first = next(iter(rows))
    print(f"{'row':24}{'forward ms':>11}{'of first':>10}{'+ backward':>12}{'of first':>10}{'peak MB':>9}")
    for row in rows:
        cells = [(medians[row, what], medians[row, what] / medians[first, what]) for what in ("forward", "whole")]
        (forward, of_forward), (whole, of_whole) = cells
        peak = f"{peaks[row]:9.0f}" if row in peaks else f"{'-':>9}"
        print(f"{row:24}{forward:11.3f}{of_forward:9.2f}x{whole:12.3f}{of_whole:9.2f}x{peak}")


def errors(rows: dict[str, Callable[..., Tensor]], ends: list[int], leaves: list[Tensor], upstream: Tensor) -> None:
    """Print the largest errors of each row against SDPA of the same numbers in fp32."""
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    form = Form(leaves[0].shape[2] ** -0.5)
    exact = both(one_at_a_time(ends, form), exact_leaves, upstream.float())
    print(f"{'largest error':24}{'result':>11}{'of query':>11}{'of key':>11}{'of value':>11}")
    for row, attend in rows.items():
        found = both(attend, leaves, upstream)
        off = [float((one.float() - other).abs().max()) for one, other in zip(found, exact, strict=True)]
        print(f"{row:24}" + "".join(f"{each:11.2e}" for each in off))


def sweep(name: str, leaves: list[Tensor], attend: Callable[..., Tensor], upstream: Tensor) -> None:
    """Print the median time of one kernel for each of its CUTS, with what torch adds to it, and then the best ones."""
    from verl_fl_overlay.kernels.triton import attention

    table, kernel, launch = getattr(attention, name.upper()), getattr(attention, f"_{name}"), attention.launch
    key = attention._columns(leaves[0]), leaves[0].element_size()
    kept, result = table[key], attend(*leaves)
    found = {}

    def alone(launched: Any, *arguments: Any, **options: Any) -> None:
        if launched is kernel:
            launch(launched, *arguments, **options)

    def run() -> None:
        if name == "forward":
            attend(*leaves)
        else:
            torch.autograd.grad(result, leaves, upstream, retain_graph=True)

    print(f"{name}: ms, (queries, keys, warps, stages)")
    attention.launch = alone
    try:
        for cut in CUTS[name]:
            table[key] = attention.Blocks(*cut)
            try:
                run()
                found[cut] = statistics.median(milliseconds(run) for _ in range(10))
                print(f"{found[cut]:9.3f} {cut}", flush=True)
            except Exception as error:  # whatever a compiler or a device makes of it
                print(f"{'-':>9} {cut} {type(error).__name__}: {str(error)[:100]!r}", flush=True)
    finally:
        attention.launch, table[key] = launch, kept
    for cut in sorted(found, key=found.__getitem__)[:8]:
        print(f"{name} {found[cut]:9.3f} {cut}{' (as it is)' if cut == kept else ''}", flush=True)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384 if device == "cuda" else 512)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 2)
    parser.add_argument("--sweep", nargs="*", choices=list(CUTS), help="these kernels, or all of them")
    options = parser.parse_args()

    found = lengths(options.tokens)
    ends = [0, *itertools.accumulate(found)]
    on_device = torch.tensor(ends, dtype=torch.int32, device=device)
    sequences, form = Sequences(on_device, on_device, max(found), max(found)), Form(options.size**-0.5)
    torch.manual_seed(SEED)
    heads = options.heads, options.kv_heads, options.kv_heads, options.heads
    shapes = [(options.tokens, each, options.size) for each in heads]
    *leaves, upstream = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    print(f"{options.tokens} tokens in {len(found)} sequences, the longest has {max(found)}; heads of {shapes[:2]}")
    rows = {"SDPA, one at a time": one_at_a_time(ends, form)}
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        rows = {"flash-attention": flash(sequences, form), "ours": ours(sequences, form), **rows}
    else:
        print("no GPU here: only SDPA runs, and these times say nothing")
    if options.sweep is not None and device == "cuda":
        for name in options.sweep or CUTS:
            sweep(name, leaves, rows["ours"], upstream)
        return
    errors(rows, ends, leaves, upstream)
    compare(rows, leaves, upstream, options.rounds)


if __name__ == "__main__":
    main()
