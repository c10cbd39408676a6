"""The Triton kernel of rotary embeddings on a CPU, through Triton's interpreter, against float64."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from processes import output

PROGRAM = """
import json, torch
from verl_fl_overlay.kernels import pairs
from verl_fl_overlay.kernels.triton import rotary

torch.cpu.current_device = lambda: None  # the interpreter has no device
torch.manual_seed(0)


def gradients(results, heads, **how):
    upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in results]
    return torch.autograd.grad(results, heads, upstream, **how)


def once(rotate, *heads):
    results = rotate(*heads)
    return (*results, *gradients(results, heads))


def twice(rotate, *heads):
    first = gradients([x.sin() for x in rotate(*heads)], heads, create_graph=True)
    return gradients(first, heads)


def expanded(rotate, *heads):  # whose upstream gradient is one number, repeated by strides of zero
    return torch.autograd.grad(sum(x.sum() for x in rotate(*heads)), heads)


def several(rotate, *heads):  # one backward for several upstream gradients
    results = rotate(*heads)
    upstream = [torch.linspace(-1, 1, 3 * x.numel()).view(3, *x.shape).to(x) for x in results]
    return torch.autograd.grad(results, heads, upstream, is_grads_batched=True)


def off(ask, *heads):
    found = ask(
        lambda *heads: rotary.rotate(heads, cos, sin, layout),
        *(x.detach().requires_grad_() for x in heads),
    )
    exact = ask(
        lambda *heads: tuple(pairs.rotated(x, cos.to(x), sin.to(x), layout) for x in heads),
        *(x.detach().double().requires_grad_() for x in heads),
    )
    return float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]).max())


told = {}
heads = torch.randn(2, 5, 4, 24).transpose(1, 2), torch.randn(2, 3, 5, 48)[..., ::2]
for width, sections in ((12, None), (24, None), (12, [2, 1, 3])):
    for layout in pairs.layouts(24, width, sections):
        shape = [3] * bool(sections) + [1 + bool(layout.angles.apart), 5]
        cos, sin = torch.randn(*shape, 48)[..., : 2 * width : 2], torch.randn(*shape, 30)[..., :width]
        told[f"{width} of {layout}"] = off(once, *heads)
    for ask in (twice, expanded, several):
        told[f"{ask.__name__}, {width} of {layout}"] = off(ask, *heads)
told["q alone"] = off(once, heads[0])
print(json.dumps(told))
"""


def test_the_kernel_matches_float64_forward_and_backward_in_each_layout(tmp_path):
    told = json.loads(output(PROGRAM, env={"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}))
    assert len(told) == 15 + 6 + 12 + 3 * 3 + 1
    assert {name: value for name, value in told.items() if not value < 2e-6} == {}
