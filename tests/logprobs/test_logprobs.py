"""Token log-probs against float64: values, gradients, shapes, memory and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from logprobs.reference import expected, random_case, relative_error  # noqa: E402
from verl_fl_overlay.kernels import logprobs_torch  # noqa: E402
from verl_fl_overlay.kernels.logprobs import LogprobsInputError, kernels_used, token_logprobs  # noqa: E402

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
    assert kernels_used()["cpu, bfloat16"] == "torch"


def test_a_chip_whose_torch_cannot_assert_computes_all_the_same(monkeypatch):
    def missing(*args):
        raise NotImplementedError("_assert_async for this chip")

    monkeypatch.setattr(torch, "_assert_async", missing)
    logits, labels = torch.empty(4, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    assert token_logprobs(logits, labels).shape == (4,)
