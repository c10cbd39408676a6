"""The Triton kernels of token log-probs against float64, on a device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

from logprobs.reference import expected, expected_statistics, random_case, relative_error  # noqa: E402
from processes import python  # noqa: E402

from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.logprobs import TokenLogprobs  # noqa: E402
from verl_fl_overlay.kernels.tokens import TokenQuestion  # noqa: E402

computer = TokenLogprobs(Agreement())


def token_logprobs(*asked, **more):
    return computer(TokenQuestion(*asked, **more)).log_probs


GRADIENT_BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", GRADIENT_BOUND, ids=str)
@pytest.mark.parametrize("shape", [(5, 151936), (300, 4097), (2, 7, 1000), (1, 3), (0, 16)], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_values_and_gradients_match_float64(shape, dtype, in_place):
    logits, labels, upstream = random_case(shape, dtype, "cuda", seed=shape[-1])
    exact, exact_gradient = expected(logits, labels, upstream)
    leaf = logits.requires_grad_()
    result = token_logprobs(leaf * 1, labels, in_place=in_place)
    (gradient,) = torch.autograd.grad(result, leaf, upstream)
    assert computer.used[f"cuda, {str(dtype).removeprefix('torch.')}"] == "triton"
    assert result.dtype == torch.float32
    assert result.shape == shape[:-1]
    if result.numel():
        assert relative_error(result, exact) < 2e-6
        assert relative_error(gradient, exact_gradient) < GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("dtype", GRADIENT_BOUND, ids=str)
@pytest.mark.parametrize("shape", [(5, 151936), (300, 4097), (2, 7, 1000), (1, 3)], ids=str)
@pytest.mark.parametrize("temperature", [None, 0.7, "rows"])
@pytest.mark.parametrize("asked", [(True, False), (True, True)], ids=["entropy", "entropy and squares"])
def test_entropy_and_squares_match_float64(shape, dtype, temperature, asked):
    logits, labels, _ = random_case(shape, dtype, "cuda", seed=shape[-1])
    if temperature == "rows":
        temperature = torch.rand(shape[:-1], device="cuda") + 0.5
    upstream = [torch.randn(shape[:-1], device="cuda") if on else None for on in (True, *asked)]
    leaf = logits.clone().requires_grad_()
    found = computer(TokenQuestion(leaf * 1, labels, temperature, None, *asked, in_place=True))
    torch.autograd.backward(*zip(*((a, b) for a, b in zip(found, upstream, strict=True) if b is not None), strict=True))
    exact, gradient = expected_statistics(logits, labels, 1.0 if temperature is None else temperature, upstream)
    for one, other in zip(found, exact, strict=True):
        assert one is None or relative_error(one, other) < 5e-6
    assert relative_error(leaf.grad, gradient) < max(1.5 * GRADIENT_BOUND[dtype], 2e-4)
    assert set(computer.used.values()) == {"triton"}


def test_a_view_with_other_strides_is_not_copied():
    whole, _, _ = random_case((3, 40, 5000), torch.bfloat16, "cuda")
    labels = torch.randint(0, 5000, (3, 30), device="cuda")
    upstream = torch.randn(3, 30, device="cuda")
    view = whole[:, 5:35]
    exact, exact_gradient = expected(view, labels, upstream)
    leaf = view.detach().requires_grad_()
    before = torch.cuda.memory_allocated()
    result = token_logprobs(leaf, labels)
    assert torch.cuda.memory_allocated() - before < 10_000
    (gradient,) = torch.autograd.grad(result, leaf, upstream)
    assert relative_error(result, exact) < 2e-6
    assert relative_error(gradient, exact_gradient) < GRADIENT_BOUND[torch.bfloat16]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_gives_nan_there_and_nowhere_else(poison):
    logits, labels, _ = random_case((3, 5000), torch.bfloat16, "cuda")
    logits[1, 7] = poison
    leaf = logits.requires_grad_()
    result = token_logprobs(leaf, labels)
    (gradient,) = torch.autograd.grad(result, leaf, torch.tensor([1.0, 0.0, 1.0], device="cuda"))
    assert torch.isnan(result).tolist() == [False, True, False]
    assert torch.isnan(gradient).any(-1).tolist() == [False, True, False]


def test_in_place_needs_no_second_copy_of_the_logits():
    logits = torch.randn(512, 151936, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 151936, (512,), device="cuda")
    token_logprobs(logits, labels)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(token_logprobs(logits, labels, in_place=True).sum(), logits)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.01 * logits.numel() * logits.element_size()


def test_a_label_outside_the_vocabulary_stops_the_device():
    done = python(
        """
        import torch
        from verl_fl_overlay.kernels.agreement import Agreement
        from verl_fl_overlay.kernels.logprobs import TokenLogprobs
        from verl_fl_overlay.kernels.tokens import TokenQuestion
        logits, labels = torch.randn(4, 8, device="cuda"), torch.tensor([0, 1, 8, 2], device="cuda")
        TokenLogprobs(Agreement())(TokenQuestion(logits, labels))
        torch.cuda.synchronize()
        print("computed")
        """,
        env={},
    )
    assert done.returncode != 0
    assert "computed" not in done.stdout
    assert "outside the vocabulary" in done.stderr or "device-side assert" in done.stderr
