"""Token log-probs against float64: values, gradients, shapes, memory and what is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from logprobs.reference import expected, random_case, relative_error  # noqa: E402
from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.logprobs import Logprobs  # noqa: E402
from verl_fl_overlay.kernels import agreement as agreement_module  # noqa: E402
from verl_fl_overlay.kernels import logprobs_torch  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.logprobs import LogprobsInputError, TokenLogprobs  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

token_logprobs = TokenLogprobs(Agreement())

GRADIENT_BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6, torch.float64: 1e-14}
"""Half a unit in the last place of the type the gradient is stored in; fp32: what exp and a sum may lose."""

SHAPES = [(7, 1000), (1, 3), (3, 5, 257), (2, 2, 3, 64), (33,)]


def run(logits, labels, upstream, in_place=False):
    """Return log-probs and the gradient of the logits, which are no leaf, as in a model."""
    leaf = logits.clone().requires_grad_()
    result = token_logprobs(leaf * 1, labels, in_place=in_place)
    result.backward(upstream.to(result.dtype))
    return result, leaf.grad


@pytest.mark.parametrize("dtype", GRADIENT_BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_values_and_gradients_match_float64(shape, dtype, in_place):
    case = random_case(shape, dtype, seed=len(shape))
    result, gradient = run(*case, in_place=in_place)
    exact, exact_gradient = expected(*case)
    assert result.shape == shape[:-1]
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(result, exact) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert gradient.dtype == dtype
    assert relative_error(gradient, exact_gradient) < GRADIENT_BOUND[dtype]


def test_one_chunk_or_many_give_the_same(monkeypatch):
    case = random_case((37, 128), torch.bfloat16)
    whole = run(*case)
    monkeypatch.setattr(logprobs_torch, "CHUNK", 3 * 128)
    for found, one in zip(run(*case), whole, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)


def test_a_nearly_certain_token_keeps_its_digits():
    logits = torch.zeros(1, 4)
    logits[0, 1] = 400.0
    logits[0, 2] = 388.0
    labels = torch.tensor([1])
    exact, _ = expected(logits, labels, torch.ones(1))
    assert abs(float(token_logprobs(logits, labels)) - float(exact)) < 1e-7  # the logits' own rounding is 3e-5


def test_views_with_any_strides_are_taken_as_they_are():
    whole, _, _ = random_case((4, 10, 96), torch.bfloat16)
    labels = torch.randint(0, 96, (4, 6))
    upstream = torch.randn(4, 6)
    view = whole[:, 3:-1, :]
    exact, exact_gradient = expected(view, labels, upstream)
    for logits in (
        view.clone(),
        whole.clone()[:, 3:-1],
        view.transpose(0, 1).contiguous().transpose(0, 1),
        view.mT.contiguous().mT,
    ):
        leaf = logits.detach().requires_grad_()
        for in_place in (False, True):  # in place last: it overwrites the logits
            result = token_logprobs(leaf, labels, in_place=in_place)
            (gradient,) = torch.autograd.grad(result, leaf, upstream)
            assert relative_error(result, exact) < 1e-6
            assert relative_error(gradient, exact_gradient) < GRADIENT_BOUND[torch.bfloat16]


def test_empty_input_gives_an_empty_result_and_gradient():
    logits = torch.empty(0, 11, requires_grad=True)
    result = token_logprobs(logits, torch.empty(0, dtype=torch.long))
    assert result.shape == (0,)
    result.sum().backward()
    assert logits.grad.shape == (0, 11)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_gives_nan_there_and_nowhere_else(poison):
    logits, labels, _ = random_case((3, 50), torch.bfloat16)
    logits[1, 7] = poison
    result, gradient = run(logits, labels, torch.tensor([1.0, 0.0, 1.0]))
    assert torch.isnan(result).tolist() == [False, True, False]
    assert torch.isnan(gradient).any(-1).tolist() == [False, True, False]


def test_tokens_that_cannot_be_drawn_have_probability_zero():
    logits, labels, upstream = random_case((4, 32), torch.float32)
    logits[:, 20:] = float("-inf")
    labels.clamp_(max=19)
    result, gradient = run(logits, labels, upstream)
    exact, exact_gradient = expected(logits, labels, upstream)
    assert relative_error(result, exact) < 1e-6
    assert relative_error(gradient, exact_gradient) < 1e-6
    assert float(gradient[:, 20:].abs().max()) == 0


def test_in_place_writes_the_gradient_over_the_logits():
    logits, labels, upstream = random_case((5, 40), torch.bfloat16)
    inner = logits.clone().requires_grad_() * 1
    seen = []
    inner.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    token_logprobs(inner, labels, in_place=True).backward(upstream)
    assert seen == [inner.data_ptr()]


def test_someone_else_who_saved_the_logits_gets_an_error_and_no_wrong_gradient():
    logits, labels, _ = random_case((5, 40), torch.bfloat16)
    inner = logits.clone().requires_grad_() * 1
    squares = inner.square().sum()  # saves the logits
    token_logprobs(inner, labels, in_place=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_no_gradient_keeps_nothing():
    logits, labels, _ = random_case((5, 40), torch.float32)
    with torch.no_grad():
        assert token_logprobs(logits.requires_grad_(), labels).grad_fn is None


@pytest.mark.parametrize("bad", [-100, -1, 40])
def test_a_label_outside_the_vocabulary_is_refused(bad):
    logits, labels, _ = random_case((5, 40), torch.float32)
    labels[2] = bad
    with pytest.raises(LogprobsInputError, match=r"labels must be in \[0, 40\)"):
        token_logprobs(logits, labels)


def test_misfits_are_refused_with_what_was_found():
    logits, labels, _ = random_case((5, 40), torch.float32)
    with pytest.raises(LogprobsInputError, match=r"\(5, 40\) have 5 rows, labels \(4,\) are 4"):
        token_logprobs(logits, labels[:4])
    with pytest.raises(LogprobsInputError, match=r"torch\.float32$"):
        token_logprobs(logits, labels.float())


def test_who_computed_is_told():
    run(*random_case((2, 8), torch.bfloat16))
    assert token_logprobs.used["cpu, bfloat16"] == "torch"


def test_a_chip_whose_torch_cannot_assert_computes_all_the_same(monkeypatch):
    def missing(*args):
        raise NotImplementedError("_assert_async for this chip")

    monkeypatch.setattr(torch, "_assert_async", missing)
    logits, labels = torch.empty(4, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    assert token_logprobs(logits, labels).shape == (4,)


class Lookalikes:
    """What a chip's Triton could make of the kernels; ``right`` is what they should give."""

    @staticmethod
    def right(values):
        return values

    @staticmethod
    def first_block_alone(values):
        return torch.where(torch.arange(values.shape[-1]) < 4096, values, -torch.inf)

    @staticmethod
    def the_rest_of_the_last_block_counts_as_zeros(values):
        return functional.pad(values, (0, 2 * 4096 - values.shape[-1]))

    @staticmethod
    def in_bf16(values):
        return values.bfloat16().float()

    @staticmethod
    def at_another_temperature(values):
        return values / 1.01


def triton_that(change, gradient_of):
    """Return a module with kernels that see the logits so, and whose gradient is so."""

    def forward(logits, labels, result, normalizer):
        seen = change(logits.float())
        normalizer.copy_(torch.logsumexp(seen, -1))
        result.copy_(seen.gather(-1, labels[:, None])[:, 0] - normalizer)

    def backward(logits, labels, normalizer, upstream, gradient):
        seen = gradient_of(logits.float())[:, : logits.shape[-1]]
        softmax = (seen - normalizer[:, None]).exp()
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1])
        gradient.copy_(upstream[:, None] * (one_hot - softmax))

    return SimpleNamespace(forward=forward, backward=backward)


def chosen(monkeypatch, dtype, triton):
    """Return what computed where these are the kernels of Triton, and a CPU has them."""
    import verl_fl_overlay.kernels.triton

    name = "verl_fl_overlay.kernels.triton.logprobs"
    monkeypatch.setitem(sys.modules, name, triton)
    monkeypatch.delattr(verl_fl_overlay.kernels.triton, "logprobs", raising=False)
    monkeypatch.setattr(agreement_module, "NATIVE_DEVICES", ())
    log_probs = TokenLogprobs(Agreement())
    case = random_case((3, 50), dtype)
    assert relative_error(log_probs(*case[:2]), expected(*case)[0]) < 1e-5
    (told,) = log_probs.used.values()
    return told


ON_TRITON = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
WRONG = [name for name in vars(Lookalikes) if name[0] != "_" and name != "right"]


@ON_TRITON
def test_kernels_that_agree_are_used(monkeypatch, dtype):
    assert chosen(monkeypatch, dtype, triton_that(Lookalikes.right, Lookalikes.right)) == "triton"


@ON_TRITON
@pytest.mark.parametrize("wrong", WRONG)
def test_kernels_with_other_log_probs_are_not_used(monkeypatch, dtype, wrong):
    if (wrong, dtype) == ("in_bf16", torch.bfloat16):
        pytest.skip("these logits are in bf16")
    told = chosen(monkeypatch, dtype, triton_that(getattr(Lookalikes, wrong), Lookalikes.right))
    assert told.startswith("torch (output 0 differs")


@ON_TRITON
@pytest.mark.parametrize("wrong", ["first_block_alone", "at_another_temperature"])
def test_kernels_with_another_gradient_are_not_used(monkeypatch, dtype, wrong):
    told = chosen(monkeypatch, dtype, triton_that(Lookalikes.right, getattr(Lookalikes, wrong)))
    assert told.startswith("torch (gradient 0 differs")


@ON_TRITON
def test_log_probs_that_were_rounded_are_seen(monkeypatch, dtype):
    triton = triton_that(Lookalikes.right, Lookalikes.right)

    def rounded(logits, labels, result, normalizer, forward=triton.forward):
        forward(logits, labels, result, normalizer)
        result.copy_(result.half())

    triton.forward = rounded
    assert chosen(monkeypatch, dtype, triton).startswith("torch (output 0 differs")


def test_a_triton_that_cannot_be_imported_is_told(monkeypatch):
    assert chosen(monkeypatch, torch.float32, None).startswith("torch (ModuleNotFoundError: ")


def test_the_feature_answers_while_it_is_on():
    logits, labels, _ = random_case((4, 8), torch.bfloat16)
    for _ in range(2):
        feature = Logprobs(Settings.of())
        assert events.token_logprobs.ask(logits, labels, False, lambda: False) is None
        feature.start()
        assert feature.describe() == {"kernels": {}}
        torch.testing.assert_close(
            events.token_logprobs.ask(logits, labels, False, lambda: False), token_logprobs(logits, labels)
        )
        assert feature.describe() == {"kernels": {"cpu, bfloat16": "torch"}}
        mine = type("Mine", (torch.Tensor,), {})
        assert events.token_logprobs.ask(logits.as_subclass(mine), labels, False, lambda: False) is None, (
            "verl's own computes these"
        )
        assert events.token_logprobs.ask(logits, labels, False, lambda: True) is None, "verl has a kernel of its own"
        feature.stop()
        assert feature.describe() == {"kernels": {}}
