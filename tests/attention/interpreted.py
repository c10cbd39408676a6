"""The Triton kernels of attention in Triton's interpreter: each case's errors against float64, and what else they do.

TRITON_INTERPRET=1 python tests/attention/interpreted.py prints JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from attention.reference import error, expected, packed, random_case
from verl_fl_overlay.kernels.sequences import ANY, Form

BLOCKS = [(16, 16), (32, 16), (16, 32)]
"""Queries and keys of a block in the cases: so small that a few dozen tokens are several blocks."""


@dataclass
class Case:
    """Attention of packed sequences of these lengths; ``more`` tokens come after the last one."""

    queries: list[int]
    keys: list[int] | None = None
    form: Form = field(default_factory=lambda: Form(0.2))
    heads: tuple[int, int] = (2, 2)
    sizes: tuple[int, int] = (32, 32)
    sinks: bool = False
    more: int = 0
    dtype: str = "float32"
    blocks: tuple[int, int] = (16, 16)


UNEQUAL = {"queries": [37, 0, 1, 20], "keys": [52, 3, 0, 7]}

CASES = {
    "causal": Case([40, 17]),
    "not causal": Case([40, 17], form=Form(0.2, causal=False)),
    "one token, one sequence": Case([1]),
    "empty and one-token sequences": Case([0, 33, 0, 1, 1, 16, 0]),
    "only empty sequences": Case([0, 0], more=5),
    "causal, other lengths of keys": Case(**UNEQUAL),
    "causal, fewer keys than queries": Case([40, 20], [9, 35]),
    "not causal, other lengths of keys": Case(**UNEQUAL, form=Form(0.2, causal=False)),
    "tokens after the last sequence": Case([21, 30], more=19),
    "window to the left": Case([61, 20], form=Form(0.2, window=(18, ANY))),
    "window of two tokens": Case([35], form=Form(0.2, window=(1, 0))),
    "window to both sides": Case([61, 20], form=Form(0.2, causal=False, window=(9, 21))),
    "window to the right": Case([50], form=Form(0.2, causal=False, window=(ANY, 5))),
    "window, other lengths of keys": Case([30, 41], [50, 12], form=Form(0.2, causal=False, window=(9, 4))),
    "window over two blocks": Case([100], form=Form(0.2, window=(50, 0))),
    "soft cap": Case([40, 5], form=Form(0.7, softcap=1.5)),
    "sinks": Case([40, 5], sinks=True),
    "sinks of queries that see nothing": Case(**UNEQUAL, sinks=True, more=3),
    "three heads to one": Case([18, 5], heads=(6, 2)),
    "all heads to one": Case([20, 5], heads=(4, 1)),
    "size 72": Case([20, 5], sizes=(72, 72)),
    "size 80": Case([20], sizes=(80, 80)),
    "size 96": Case([20], sizes=(96, 96)),
    "size 256": Case([20], sizes=(256, 256)),
    "sizes 192 and 128": Case([35], sizes=(192, 128)),
    "sizes 24 and 40": Case([35], sizes=(24, 40)),
    "all at once": Case(
        [70, 0, 31, 1],
        [85, 4, 20, 1],
        form=Form(0.4, window=(37, 0), softcap=3.0),
        heads=(4, 2),
        sizes=(40, 24),
        sinks=True,
        more=7,
    ),
    "more queries in a block": Case([70, 3], form=Form(0.2, window=(40, 0)), blocks=(32, 16)),
    "more keys in a block": Case([70, 3], form=Form(0.2, window=(40, 0)), blocks=(16, 32)),
    "bf16": Case([40, 5], heads=(4, 2), sizes=(64, 64), form=Form(0.125), dtype="bfloat16"),
    "fp16": Case([40, 5], heads=(4, 2), sizes=(64, 64), form=Form(0.125), dtype="float16"),
    "bf16, all at once": Case(
        [33, 9], [40, 9], Form(0.2, window=(20, 0), softcap=5.0), (4, 2), (72, 40), True, 3, "bfloat16"
    ),
}


def main() -> None:
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    from verl_fl_overlay.kernels.triton import attention
    from verl_fl_overlay.kernels.triton.attention import Blocks, attend

    torch.cpu.current_device = lambda: None  # the interpreter has no device
    multiply = InterpreterBuilder.create_dot

    def dot(self, a, b, *rest):  # the interpreter's own multiplies the bits of bf16 as integers
        return multiply(self, *(self.cast_impl(x, float32) if x.dtype == bfloat16 else x for x in (a, b)), *rest)

    InterpreterBuilder.create_dot = dot
    tables = attention.FORWARD, attention.QUERY_GRADIENT, attention.KEY_GRADIENT
    own = [dict(table) for table in tables]

    def cut(queries, keys):
        for table in tables:
            table.update(dict.fromkeys(table, Blocks(queries, keys, 4, 1)))

    def gradients(leaves, upstream, sequences, form):
        result = attend(*leaves[:3], sequences, form, *leaves[3:])
        return result.detach(), *torch.autograd.grad(result, leaves, upstream)

    def inputs(case):
        sequences = packed(case.queries, case.keys)
        tokens = [sum(lengths) + case.more for lengths in (case.queries, case.keys or case.queries)]
        *tensors, upstream = random_case(*tokens, *case.heads, *case.sizes, getattr(torch, case.dtype))
        sinks = [torch.randn(case.heads[0], generator=torch.Generator().manual_seed(1))] if case.sinks else []
        return [each.requires_grad_() for each in (*tensors, *sinks)], upstream, sequences, case.form

    def errors(case):
        leaves, upstream, sequences, form = given = inputs(case)
        exact = expected(*leaves[:3], upstream, sequences, form, *leaves[3:])
        found = gradients(*given)
        assert all(one.dtype == leaf.dtype for one, leaf in zip(found, [leaves[0], *leaves], strict=True))
        return [error(one, other) for one, other in zip(found, exact, strict=True)]

    told = {}
    for name, case in CASES.items():
        cut(*case.blocks)
        import time

        t = time.time()
        told[name] = errors(case)
        print(name, time.time() - t, file=sys.stderr)
    cut(16, 16)

    # Heads first, as Hugging Face has them, and every second element of something larger.
    leaves, upstream, sequences, form = given = inputs(CASES["three heads to one"])
    views = [leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for leaf in leaves]
    gaps = [torch.stack([leaf.detach()] * 2, -1)[..., 0].requires_grad_() for leaf in leaves]
    whole = torch.cat([leaf.detach() for leaf in leaves], 1)
    slices = [part.requires_grad_() for part in whole.split([leaf.shape[1] for leaf in leaves], 1)]
    plain = gradients(*given)
    told["strides"] = [
        all(map(torch.equal, plain, gradients(each, other, sequences, form)))
        for each in (views, gaps, slices)
        for other in (upstream, upstream.transpose(0, 1).contiguous().transpose(0, 1))
    ]
    ones = gradients(leaves, torch.ones_like(upstream), sequences, form)
    told["strides"].append(
        all(map(torch.equal, ones, gradients(leaves, torch.ones(1).expand(upstream.shape), *given[2:])))
    )
    told["twice"] = all(map(torch.equal, plain, gradients(*given)))

    # The heads that see one: divided among programs, and not.
    parts = []
    for programs in (1, 20, 2**20):
        attention.PROGRAMS = programs
        parts.append(gradients(*given))
    told["parts"] = [
        error(one, other.double()) for found in parts[1:] for one, other in zip(found, parts[0], strict=True)
    ]
    told["number of parts"] = [attention._parts(6, programs) for programs in (2**20, 2**19, 2**18, 1)]

    # What a token after the last sequence holds reaches nobody.
    leaves, upstream, sequences, form = inputs(CASES["tokens after the last sequence"])
    with torch.no_grad():
        for leaf in leaves:
            leaf[sequences.ends_q[-1] :] = float("nan")
    found = gradients(leaves, upstream, sequences, form)
    told["NaN after the last sequence"] = [
        [bool(one[: sequences.ends_q[-1]].isfinite().all()), float(one[sequences.ends_q[-1] :].abs().max())]
        for one in found
    ]

    longer = sequences.__class__(sequences.ends_q, sequences.ends_k, 1000, 1000)
    told["longest may be larger"] = all(map(torch.equal, found[0], attend(*leaves, longer, form).detach()))
    empty = [leaf[:0].detach().requires_grad_() for leaf in leaves]
    told["no tokens"] = [list(one.shape) for one in gradients(empty, upstream[:0], packed([]), form)]

    for table, before in zip(tables, own, strict=True):
        table.update(before)
    told["blocks as on a chip"] = errors(Case([150, 30], heads=(2, 1), sizes=(64, 64), dtype="float16"))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
