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
from verl_fl_overlay.kernels import logprobs, logprobs_torch
from verl_fl_overlay.kernels.triton import gate, rms_norm
from verl_fl_overlay.kernels.triton import logprobs as logprobs_triton

torch.cpu.current_device = lambda: None  # the interpreter has no device
rms_norm.PROGRAMS = 3  # so that one program takes several blocks of rows
torch.manual_seed(0)


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


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


told = {}
for rows, size in ((1, 7), (37, 96), (5, 2500), (40, 512)):
    values, weight = torch.randn(rows, size), torch.randn(size)
    told[f"rms_norm {rows} x {size}"] = off(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), norm, values, weight)
strided = torch.randn(4, 3, 5, 16).transpose(1, 2)
told["rms_norm of a view"] = off(lambda x, w: rms_norm.rms_norm(x, w, 1e-6), norm, strided, torch.randn(16))
told["silu_and_mul"] = off(
    gate.silu_and_mul, lambda g, u: torch.nn.functional.silu(g) * u, torch.randn(3, 700), torch.randn(3, 700)
)
told["rms_norm, expanded"] = off(
    expanded(lambda x, w: rms_norm.rms_norm(x, w, 1e-6)), expanded(norm), torch.randn(3, 16), torch.randn(16)
)
told["silu_and_mul, expanded"] = off(
    expanded(gate.silu_and_mul),
    expanded(lambda g, u: torch.nn.functional.silu(g) * u),
    torch.randn(3, 16),
    torch.randn(3, 16),
)

poisoned = torch.randn(3, 16)
poisoned[1, 2] = float("nan")
told["NaN in a norm"] = torch.isnan(rms_norm.rms_norm(poisoned, torch.ones(16), 1e-6)).any(-1).tolist()

logits, labels, upstream = torch.randn(3, 5000) * 8, torch.tensor([0, 4999, 17]), torch.tensor([1.0, 0.0, -2.0])
logits[1, 3] = float("nan")
sides = []
for each, dtype in ((logprobs_triton, torch.float32), (logprobs_torch, torch.float64)):
    values = logits.to(dtype)
    result, normalizer, gradient = torch.empty(3, dtype=dtype), torch.empty(3, dtype=dtype), torch.empty_like(values)
    each.forward(values, labels, result, normalizer)
    each.backward(values, labels, normalizer, upstream.to(dtype), gradient)
    sides.append((result, gradient))
(result, gradient), (exact, exact_gradient) = sides
told["NaN"] = [torch.isnan(result).tolist(), torch.isnan(gradient).any(-1).tolist()]
good = [0, 2]
told["log-probs"] = float((result - exact)[good].norm() / exact[good].norm())
told["gradient"] = float((gradient - exact_gradient)[good].norm() / exact_gradient[good].norm())

def log_probs(values):
    return logprobs._apply(values, labels, False, logprobs_triton if values.dtype == torch.float32 else logprobs_torch)


for name, labels in (("a column", torch.randint(0, 50, (4, 6))[:, -1:]), ("every third", torch.arange(12)[::3])):
    told[f"log-probs of {name} of labels"] = off(
        log_probs,
        lambda values: values.log_softmax(-1).gather(-1, labels.reshape(-1, 1))[:, 0],
        torch.randn(4, 50) * 4,
    )
print(json.dumps(told))
"""


def test_kernels_match_float64_forward_and_backward(tmp_path):
    told = json.loads(output(PROGRAM, env={"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}))
    assert told.pop("NaN in a norm") == [False, True, False]
    assert told.pop("NaN") == [[False, True, False], [False, True, False]]
    assert len(told) == 12
    assert all(value < 2e-5 for value in told.values()), told


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verl_fl_overlay.kernels import turns
from verl_fl_overlay.kernels.triton.gate import _silu_and_mul

hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
types = {"gate": "*bf16", "up": "*bf16", "result": "*bf16", "count": "i32", "BLOCK": "constexpr"}
source = ASTSource(fn=_silu_and_mul, signature=types, constexprs={"BLOCK": 1024})
with turns.first_to_compile("the gate"):
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(*hits)
"""


def test_one_of_several_processes_compiles_and_the_others_load(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda _: output(COMPILE, env=environment), range(3)))
    assert sorted(told) == ["False", "True", "True"]
