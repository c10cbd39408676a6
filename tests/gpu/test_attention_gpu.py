"""Attention over packed sequences on a device: each backend against float64, who is chosen, and verl's engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

from attention.interpreted import CASES  # noqa: E402
from attention.reference import error, expected, packed, random_case  # noqa: E402
from processes import result  # noqa: E402

from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.attention import PackedAttention  # noqa: E402
from verl_fl_overlay.kernels.attention_torch import flash, one_at_a_time  # noqa: E402
from verl_fl_overlay.kernels.sequences import Form  # noqa: E402

BOUND = 1.2e-2  # weights and results are rounded to bf16, 2 ** -8
SIZES = [(32, 32), (64, 64), (72, 72), (80, 80), (128, 128), (192, 128), (256, 256)]


def compared(attend, sizes, form, sinks=False, heads=(6, 2), lengths=(1, 200, 0, 131, 77)):
    """Return the errors of the result and all gradients in bf16 against float64."""
    sequences = packed(lengths, device="cuda")
    tokens = sum(lengths)
    given = random_case(tokens, tokens, *heads, *sizes, dtype=torch.bfloat16, device="cuda")
    *leaves, upstream = [each.requires_grad_() for each in given]
    sink = torch.linspace(-1, 2, heads[0], device="cuda").bfloat16().requires_grad_() if sinks else None
    found = attend(*leaves, sequences, form, sink)
    wanted = [*leaves, *([sink] if sinks else [])]
    found = (found, *torch.autograd.grad(found, wanted, upstream))
    exact = expected(*leaves, upstream, packed(lengths), form, sink)
    return [error(one, other) for one, other in zip(found, exact, strict=True)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "form", [Form(0.1), Form(0.1, causal=False), Form(0.1, window=(50, 50)), Form(0.1, softcap=3.0)], ids=str
)
def test_triton_matches_float64(sizes, form):
    from verl_fl_overlay.kernels.triton.attention import attend

    assert max(compared(attend, sizes, form)) < BOUND


def test_triton_takes_sinks_and_a_window():
    from verl_fl_overlay.kernels.triton.attention import attend

    assert max(compared(attend, (64, 64), Form(0.1, window=(50, 50)), sinks=True, heads=(8, 1))) < 2 * BOUND


@pytest.mark.parametrize("sizes", [s for s in SIZES if s[0] == s[1]], ids=str)
@pytest.mark.parametrize("form", [Form(0.1), Form(0.1, causal=False), Form(0.1, window=(50, 50))], ids=str)
def test_torchs_flash_attention_matches_float64(sizes, form):
    assert max(compared(flash, sizes, form)) < BOUND


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.dtype == "float32" and not c.more])
def test_one_at_a_time_matches_float64(name):
    case = CASES[name]
    sequences = packed(case.queries, case.keys, device="cuda")
    tokens = sum(case.queries), sum(case.keys or case.queries)
    *tensors, upstream = random_case(*tokens, *case.heads, *case.sizes, device="cuda")
    sinks = torch.linspace(-1, 2, case.heads[0], device="cuda") if case.sinks else None
    exact = expected(*tensors, upstream, packed(case.queries, case.keys), case.form, sinks)[0]
    assert error(one_at_a_time(*tensors, sequences, case.form, sinks), exact) < 1e-3  # torch may use TF32


def chosen(size=128, sinks=False, deterministic=False, dtype=torch.bfloat16, **form):
    made = PackedAttention(Agreement())
    query, key, value, _ = random_case(300, 300, 6, 2, size, dtype=dtype, device="cuda")
    sink = torch.zeros(6, device="cuda", dtype=dtype) if sinks else None
    made(query.requires_grad_(), key, value, packed([120, 180], device="cuda"), Form(0.1, **form), sink, deterministic)
    ((_, used),) = made.used.items()
    return used


@pytest.mark.parametrize("form", [{}, {"causal": False}, {"window": (50, 50)}], ids=str)
def test_torchs_flash_attention_is_chosen_where_it_can(form):
    assert chosen(**form) == "torch's FlashAttention"


@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"sinks": True}, {"deterministic": True}, {"size": 100}], ids=str
)
def test_else_triton_is(options):
    assert chosen(**options).startswith("Triton (torch's FlashAttention: ")


def test_two_backwards_that_must_be_repeatable_give_the_same_bits():
    made = PackedAttention(Agreement())
    query, key, value, upstream = random_case(4000, 4000, 12, 2, 128, dtype=torch.bfloat16, device="cuda")
    leaves = [each.requires_grad_() for each in (query, key, value)]
    sequences = packed([1500, 2500], device="cuda")

    def gradients():
        return torch.autograd.grad(made(*leaves, sequences, Form(0.1), None, True), leaves, upstream)

    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


def test_a_longest_that_is_larger_changes_nothing():
    query, key, value, _ = random_case(300, 300, 6, 2, 64, dtype=torch.bfloat16, device="cuda")
    sequences = packed([120, 180], device="cuda")
    larger = replace(sequences, longest_q=4000, longest_k=4000)
    assert torch.equal(flash(query, key, value, sequences, Form(0.1)), flash(query, key, value, larger, Form(0.1)))


PROGRAM = Path(__file__).parents[1] / "real_engine.py"


@pytest.fixture(scope="module")
def engines(tiny_model):
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
    run = (PROGRAM, tiny_model, "--cases", "lm:fsdp2,lm:fsdp,value:fsdp2")
    return [result(*run, *options, env=env, timeout=400) for options in (("--packed",), ())]


@pytest.mark.xdist_group("engines")
@pytest.mark.parametrize("case", ["lm:fsdp2", "lm:fsdp", "value:fsdp2"])
def test_verls_engine_trains_packed_as_padded(engines, case):
    found, other = ([float.fromhex(step[n]) for step in e[case]["steps"] for n in step] for e in engines)
    assert found == pytest.approx(other, rel=0.03, abs=0.02)


@pytest.mark.xdist_group("engines")
def test_verls_engine_was_served_by_torchs_flash_attention(engines):
    told = engines[0]["report"]["features"]["attention"]["detail"]
    assert told["backends"] == {"cuda, bfloat16, heads of 16, causal": "torch's FlashAttention"}
    assert set(told["packed models"].values()) == {"keeps them apart"}
    assert engines[0]["derived lengths"] == 0
