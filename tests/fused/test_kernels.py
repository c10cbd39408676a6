"""The Triton kernels themselves on a CPU, through Triton's interpreter, against float64."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from processes import output

PROGRAM = """
import json, torch
from triton.runtime import interpreter
from verl_fl_overlay.kernels import gate_torch, norm_torch
from verl_fl_overlay.kernels.triton import gate, rms_norm

torch.cpu.current_device = lambda: None  # the interpreter has no device
rms_norm.PROGRAMS = 3  # so that one program takes several blocks of rows
torch.manual_seed(0)


class Strict(type):
    def __instancecheck__(cls, value):
        return isinstance(value, int)


class NumpyOf2026(int, metaclass=Strict):
    # int, as it is from numpy 2.4 on: an array with a dimension is not converted.
    def __new__(cls, value=0):
        if getattr(value, "ndim", 0):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return int(value)


interpreter.int = NumpyOf2026


def run(function, inputs):
    leaves = [value.clone().requires_grad_() for value in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(results, leaves, [torch.cos(7 * r.detach()) for r in results])
    return [*(r.detach() for r in results), *gradients]


def expanded(function):  # whose upstream gradient is one number, repeated by strides of zero
    return lambda *inputs: function(*inputs).mean()


def off(function, reference, *inputs):
    found, exact = run(function, inputs), run(reference, [value.double() for value in inputs])
    # The upstream gradient is taken from each side's own result, so that it differs by rounding alone.
    differences = [(one.double() - other).norm() / other.norm() for one, other in zip(found, exact, strict=True)]
    return float(torch.stack(differences).max())  # which is NaN if one of them is, unlike Python's max


def normed(variant):
    return [lambda x, *w, f=f: f(x, *w or [None], 1e-6, variant) for f in (rms_norm.norm, norm_torch.norm)]


def twice(function):  # the gradient of a gradient's norm
    def gradient(*inputs):
        grads = torch.autograd.grad(function(*inputs), inputs, torch.ones(()).expand(3, 8), create_graph=True)
        return sum(each.square().sum() for each in grads) / 1000  # small, as upstream is its cosine

    return gradient


def several(function, differentiated=True):  # one backward for several upstream gradients
    def gradient(*inputs):
        result = function(*inputs)
        upstream = torch.linspace(-1, 1, 4 * result.numel()).view(4, *result.shape).to(result)
        how = {"is_grads_batched": True, "create_graph": differentiated}
        found = torch.autograd.grad(result, inputs, upstream, **how)
        return sum(each.sum(0).square().sum() for each in found) / 1000

    return gradient


told = {}
for variant in norm_torch.VARIANTS[::2] + (norm_torch.Variant(rounds=True),):
    for rows, size in ((1, 7), (37, 96), (5, 2500), (40, 512)):
        values, weight = torch.randn(rows, size) + 1, torch.randn(size)
        told[f"norm {rows} x {size}, {variant}"] = off(*normed(variant), values, weight)
    told[f"norm without weight, {variant}"] = off(*normed(variant), torch.randn(5, 33) + 1)
    told[f"several gradients of {variant}"] = off(*map(several, normed(variant)), torch.randn(3, 8), torch.randn(8))
    told[f"second gradient of {variant}"] = off(*map(twice, normed(variant)), torch.randn(3, 8), torch.randn(8))
plain = normed(norm_torch.Variant())
strided = torch.randn(4, 3, 5, 16).transpose(1, 2)
x, w = torch.randn(3, 8).requires_grad_(), torch.randn(8).requires_grad_()
one, other = (several(f, differentiated=False)(x, w) for f in plain)
told["several gradients that are not differentiated"] = float((one - other) / other)
told["norm of a view"] = off(*plain, strided, torch.randn(16))
of_view = [lambda x, w, f=f: f(x, w[::2]) for f in plain]
told["norm, weight of a view"] = off(*of_view, torch.randn(3, 8), torch.randn(16))
told["norm, expanded"] = off(*map(expanded, plain), torch.randn(3, 16), torch.randn(16))
for activation in gate_torch.ACTIVATIONS:
    both = [lambda g, u, f=f: f(g, u, activation) for f in (gate.gated, gate_torch.gated)]
    told[activation] = off(*both, torch.randn(3, 700) * 3, torch.randn(3, 700))
    transposed = [lambda g, u, f=f: f(g.T, u) for f in both]
    told[f"{activation}, transposed"] = off(*transposed, torch.randn(9, 4), torch.randn(4, 9))
    told[f"{activation}, expanded"] = off(*map(expanded, both), torch.randn(3, 16), torch.randn(3, 16))
    told[f"{activation}, several gradients"] = off(*map(several, both), torch.randn(3, 8), torch.randn(3, 8))
    told[f"{activation}, second gradient"] = off(*map(twice, both), torch.randn(3, 8), torch.randn(3, 8))
    for first in (True, False):
        both = [lambda x, f=f: f(x, activation, first) for f in (gate.gated_halves, gate_torch.gated_halves)]
        name = f"halves of {activation}, gate first {first}"
        for shape in ((3, 2, 16), (2, 2 * 1500), (20, 2 * 40), (9, 2)):
            told[f"{name}, {shape}"] = off(*both, torch.randn(shape) * 1.5)
        told[f"{name}, expanded"] = off(*map(expanded, both), torch.randn(3, 16))
        told[f"{name}, several gradients"] = off(*map(several, both), torch.randn(3, 16))
        told[f"{name}, second gradient"] = off(*map(twice, both), torch.randn(3, 16))
poisoned = torch.randn(3, 16)
poisoned[1, 2] = float("nan")
told["NaN in a norm"] = torch.isnan(plain[0](poisoned, torch.ones(16))).any(-1).tolist()
print(json.dumps(told))
"""


def test_kernels_match_float64_forward_and_backward(tmp_path):
    told = json.loads(output(PROGRAM, env={"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}))
    assert told.pop("NaN in a norm") == [False, True, False]
    assert len(told) == 96
    assert {name: value for name, value in told.items() if not value < 2e-5} == {}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verl_fl_overlay.kernels import turns
from verl_fl_overlay.kernels.triton.gate import _gate

hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
types = {name: "*bf16" for name in ("gate", "up", "result")} | {name: "i32" for name in ("stride", "width", "blocks")}
constants = {"ACTIVATION": "gelu_tanh", "BLOCK": 1024}
source = ASTSource(fn=_gate, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
with turns.first_to_compile("the gate"):
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(*hits)
"""


def test_one_of_several_processes_compiles_and_the_others_load(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda _: output(COMPILE, env=environment), range(3)))
    assert sorted(told) == ["False", "True", "True"]


VARIANTS = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verl_fl_overlay.kernels.gate_torch import ACTIVATIONS
from verl_fl_overlay.kernels.triton import gate, rms_norm

FP32, COUNTS = ("inverse", "to_weight"), ("stride", "width", "blocks", "rows", "size")


def compiled(kernel, **constants):
    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in COUNTS:
            return "i64" if name == "width" else "i32"
        return "fp32" if name in ("epsilon", "offset") else "*fp32" if name in FP32 else "*bf16"

    types = {name: type_of(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


told = []
for activation in ACTIVATIONS:
    for kernel in (gate._gate, gate._gate_gradient):
        told.append(compiled(kernel, ACTIVATION=activation, BLOCK=256))
for weighted, centred in itertools.product((False, True), repeat=2):
    how = {"WEIGHTED": weighted, "CENTRED": centred, "ROWS": 2, "BLOCK": 128}
    told += [compiled(rms_norm._norm, ROUNDS=centred, **how), compiled(rms_norm._norm_gradient, **how)]
print(len(set(told)))
"""


def test_a_compiler_takes_every_variant(tmp_path):
    assert output(VARIANTS, env={"TRITON_CACHE_DIR": str(tmp_path)}) == "14"
