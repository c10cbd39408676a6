"""Attention by torch's operators against float64, and who is chosen to attend."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from attention.interpreted import CASES  # noqa: E402
from attention.reference import error, expected, packed, random_case  # noqa: E402
from verl_fl_overlay.errors import AttentionInputError  # noqa: E402
from verl_fl_overlay.kernels import attention  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.attention import Backend, PackedAttention  # noqa: E402
from verl_fl_overlay.kernels.attention_torch import one_at_a_time  # noqa: E402
from verl_fl_overlay.kernels.sequences import ANY, Form, Sequences  # noqa: E402

PLAIN = Form(0.25)
BOUND = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", CASES)
def test_one_at_a_time_matches_float64(name, dtype):
    case = CASES[name]
    sequences = packed(case.queries, case.keys)
    tokens = [sum(each) + case.more for each in (case.queries, case.keys or case.queries)]
    given = random_case(*tokens, *case.heads, *case.sizes, dtype=getattr(torch, dtype))
    *leaves, upstream = [each.requires_grad_() for each in given]
    sinks = torch.linspace(-1, 2, case.heads[0], dtype=leaves[0].dtype).requires_grad_() if case.sinks else None
    exact = expected(*leaves, upstream, sequences, case.form, sinks)
    result = one_at_a_time(*leaves, sequences, case.form, sinks)
    wanted = [*leaves, *([sinks] if case.sinks else [])]
    result = result + 0 * leaves[0].sum()  # without any key there is nothing to differentiate
    gradients = torch.autograd.grad(result, wanted, upstream, allow_unused=True, materialize_grads=True)
    assert result.dtype == leaves[0].dtype
    for found, one in zip((result, *gradients), exact, strict=True):
        assert error(found, one) < BOUND[dtype]


def choose(monkeypatch, *backends, dtype=torch.float32, form=PLAIN, sinks=None, **options):
    """Attend with ``backends`` before SDPA; return who did, and with which reasons."""
    monkeypatch.setattr(attention, "BACKENDS", (*backends, attention.BACKENDS[-1]))
    made = PackedAttention(Agreement())
    query, key, value, _ = random_case(9, 9, 4, 2, 16, dtype=dtype)
    found = made(query, key, value, packed([4, 5]), form, sinks, **options)
    assert torch.equal(found, one_at_a_time(query, key, value, packed([4, 5]), form, sinks))
    ((problem, used),) = made.used.items()
    return problem, used


def named(attend, **options):
    return Backend("another", lambda problem: "", lambda: attend, **options)


def same(query, key, value, sequences, form, sinks=None):
    return one_at_a_time(query, key, value, sequences, form, sinks)


def heads_interleaved(query, key, value, sequences, form, sinks=None):
    order = torch.arange(query.shape[1]).view(-1, key.shape[1]).T.flatten()
    return same(query[:, order], key, value, sequences, form, sinks)[:, order.argsort()]


def sequences_mixed(query, key, value, sequences, form, sinks=None):
    ends = sequences.ends_q[[0, *range(2, len(sequences.ends_q))]]
    return same(query, key, value, Sequences(ends, ends, 1, 1), form, sinks)


def no_gradient_to_keys(query, key, value, sequences, form, sinks=None):
    return same(query, key.detach(), value, sequences, form, sinks)


def changed(**fields):
    return lambda q, k, v, sequences, form, sinks=None: same(q, k, v, sequences, replace(form, **fields), sinks)


def without_sinks(query, key, value, sequences, form, sinks=None):
    return same(query, key, value, sequences, form)


WRONG = {
    "not causal": (changed(causal=False), Form(0.25)),
    "another scale": (changed(scale=0.26), Form(0.25)),
    "no window": (changed(window=(ANY, ANY)), Form(0.25, window=(3, 3))),
    "a window one token too wide": (changed(window=(41, 41)), Form(0.25, window=(60, 60))),
    "no soft cap": (changed(softcap=0.0), Form(0.25, softcap=5.0)),
    "no sinks": (without_sinks, Form(0.25)),
    "heads interleaved": (heads_interleaved, Form(0.25)),
    "sequences mixed": (sequences_mixed, Form(0.25)),
    "no gradient to keys": (no_gradient_to_keys, Form(0.25)),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_backend_with_a_fault_is_not_used(monkeypatch, fault, dtype):
    attend, form = WRONG[fault]
    sinks = torch.tensor([0.5, 1.0, -1.0, 0.0], dtype=dtype) if fault == "no sinks" else None
    _, used = choose(monkeypatch, named(attend), dtype=dtype, form=form, sinks=sinks)
    assert used.startswith("SDPA, one sequence at a time (another: ")
    assert "differs by" in used or "is missing" in used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "form", [Form(0.25), Form(0.25, window=(9, 9)), Form(0.25, causal=False, softcap=5.0)], ids=str
)
def test_a_backend_that_agrees_is_used(monkeypatch, dtype, form):
    assert choose(monkeypatch, named(same), dtype=dtype, form=form)[1] == "another"


def test_one_that_cannot_run_here_gives_way(monkeypatch):
    def broken(*given):
        raise RuntimeError("no kernel image")

    assert (
        choose(monkeypatch, named(broken))[1] == "SDPA, one sequence at a time (another: RuntimeError: no kernel image)"
    )


def test_what_a_backend_declines_is_told(monkeypatch):
    problem, used = choose(monkeypatch, *attention.BACKENDS[:2], dtype=torch.bfloat16, deterministic=True)
    assert problem == "cpu, bfloat16, heads of 16, causal, repeatable"
    assert "torch's FlashAttention: it is for CUDA and ROCm, not for cpu" in used
    assert "Triton: there are no kernels for bfloat16 on cpu" in used


def problem(**fields):
    cuda = attention.Problem(
        torch.device("cuda:0"), torch.bfloat16, 128, 128, 6, True, (False, False), 0.0, False, False
    )
    return cuda._replace(**fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"size": 72, "value_size": 72}, ""),
        ({"size": 100, "value_size": 100}, "multiples of 8, up to 256, not 100"),
        ({"size": 320, "value_size": 320}, "multiples of 8, up to 256, not 320"),
        ({"size": 192}, "not 128 beside 192"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, not float32"),
        ({"softcap": 50.0, "sinks": True}, "it has no soft cap and no sinks"),
        ({"deterministic": True}, "adds up in no fixed order"),
    ],
)
def test_what_torchs_flash_attention_declines(fields, reason):
    said = attention.BACKENDS[0].declines(problem(**fields))
    assert (reason in said) if reason else said == ""


def test_where_torch_is_repeatable_nothing_more_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(monkeypatch, named(same), deterministic=True)[0] == "cpu, float32, heads of 16, causal"


def test_each_side_of_a_window_is_checked_for_itself(monkeypatch):
    def no_right_side(query, key, value, sequences, form, sinks=None):
        return same(query, key, value, sequences, replace(form, window=(form.window[0], ANY)), sinks)

    monkeypatch.setattr(attention, "BACKENDS", (named(no_right_side), attention.BACKENDS[-1]))
    made, (query, key, value, _) = PackedAttention(Agreement()), random_case(9, 9, 4, 2, 16)
    for window in ((3, ANY), (3, 3)):
        form = Form(0.25, causal=False, window=window)
        found = made(query, key, value, packed([4, 5]), form)
        assert torch.equal(found, one_at_a_time(query, key, value, packed([4, 5]), form))


def test_without_triton_there_is_none(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda name: False)
    assert attention.BACKENDS[1].declines(problem()) == "triton is not installed"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9, 4, 16), (9, 2, 16), (8, 2, 16)), "as many values as keys; found (9, 4, 16), (9, 2, 16), (8, 2, 16)"),
        (((9, 4, 16), (9, 3, 16), (9, 3, 16)), "a multiple of the keys' heads"),
        (((9, 4, 16), (9, 2, 8), (9, 2, 8)), "one head size"),
        (((1, 9, 4, 16), (9, 2, 16), (9, 2, 16)), "(tokens, heads, size)"),
    ],
)
def test_misfits_are_refused_with_what_was_found(shapes, message):
    with pytest.raises(AttentionInputError) as caught:
        PackedAttention(Agreement())(*map(torch.zeros, shapes), packed([9]), Form(0.25))
    assert message in str(caught.value)


def test_more_tokens_than_int32_counts_are_refused():
    huge = torch.zeros(1, 1, 8, device="meta").expand(2**31, 1, 8)
    with pytest.raises(AttentionInputError, match="make the micro-batch smaller"):
        PackedAttention(Agreement())(huge, huge, huge, packed([9]), Form(0.25))


def test_sinks_of_all_heads_beside_some_heads_are_refused():
    query, key, value, _ = random_case(9, 9, 4, 2, 16)
    with pytest.raises(AttentionInputError, match=r"8 sinks and 4 heads.*ulysses_sequence_parallel_size=1"):
        PackedAttention(Agreement())(query, key, value, packed([9]), Form(0.25), torch.zeros(8))


def test_lengths_of_another_batch_are_refused():
    query, key, value, _ = random_case(20, 20, 4, 2, 16)
    with pytest.raises(AttentionInputError, match="ends at query 30 and key 30, and there are 20 queries and 20 keys"):
        PackedAttention(Agreement())(query, key, value, packed([8, 22]), Form(0.25))
