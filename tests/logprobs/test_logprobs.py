"""Token log-probs against float64: values, gradients, shapes, memory and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from logprobs.reference import expected, expected_statistics, random_case, relative_error  # noqa: E402
from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.logprobs import Logprobs  # noqa: E402
from verl_fl_overlay.kernels import agreement as agreement_module  # noqa: E402
from verl_fl_overlay.kernels import logprobs_torch  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.logprobs import LogprobsInputError, TokenLogprobs  # noqa: E402
from verl_fl_overlay.kernels.tokens import TokenAnswer, TokenQuestion  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

computer = TokenLogprobs(Agreement())


def token_logprobs(*asked, **more):
    return computer(TokenQuestion(*asked, **more)).log_probs


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
    assert computer.used["cpu, bfloat16"] == "torch"


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

    def forward(logits, labels, inverse, result):
        logprobs_torch.forward(change(logits.float()), labels, inverse, result)

    def backward(logits, labels, inverse, kept, upstream, gradient):
        seen = gradient_of(logits.float())
        written = torch.empty_like(seen)
        logprobs_torch.backward(seen, labels, inverse, kept, upstream, written)
        gradient.copy_(written[:, : logits.shape[-1]])

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
    assert relative_error(log_probs(TokenQuestion(*case[:2])).log_probs, expected(*case)[0]) < 1e-5
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

    def rounded(logits, labels, inverse, result, forward=triton.forward):
        forward(logits, labels, inverse, result)
        result.log_probs.copy_(result.log_probs.half())

    triton.forward = rounded
    assert chosen(monkeypatch, dtype, triton).startswith("torch (output 0 differs")


def test_a_triton_that_cannot_be_imported_is_told(monkeypatch):
    assert chosen(monkeypatch, torch.float32, None).startswith("torch (ModuleNotFoundError: ")


WHOLE = TokenAnswer._fields
"""Log-probs, entropy and sum of squares, in the order in which they are given."""


def asked_of(logits, labels, **more):
    return computer(TokenQuestion(logits, labels, entropy=True, squares=True, **more))


def gradient_of_all(case, temperature, upstream, **more):
    """Return the three numbers of each row and the gradient of the logits."""
    leaf = case[0].clone().requires_grad_()
    found = asked_of(leaf * 1, case[1], temperature=temperature, **more)
    used = [(one, above) for one, above in zip(found, upstream, strict=True) if above is not None]
    torch.autograd.backward(*zip(*((one, above.to(one.dtype)) for one, above in used), strict=True))
    return found, leaf.grad


def parts_of(upstream):
    """Yield which of the three gradients a loss has, by name."""
    for name, kept in {"all": (1, 1, 1), "log_probs": (1, 0, 0), "entropy": (0, 1, 0), "squares": (0, 0, 1)}.items():
        yield name, tuple(above if on else None for above, on in zip(upstream, kept, strict=True))


@pytest.mark.parametrize("dtype", GRADIENT_BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [None, 0.7, "rows"])
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_entropy_and_squares_come_from_the_same_pass(shape, dtype, temperature, in_place):
    torch.manual_seed(0)
    case = random_case(shape, dtype, seed=len(shape))
    if temperature == "rows":
        temperature = torch.rand(shape[:-1]) + 0.5
    for name, upstream in parts_of([torch.randn(shape[:-1]) for _ in WHOLE]):
        found, gradient = gradient_of_all(case, temperature, upstream, in_place=in_place)
        exact, exact_gradient = expected_statistics(*case[:2], 1.0 if temperature is None else temperature, upstream)
        for what, one, other in zip(WHOLE, found, exact, strict=True):
            bound = 1e-12 if dtype == torch.float64 else 3e-6
            assert relative_error(one, other) < bound, (name, what)
        # p - S and log(p) + H of a nearly certain token are differences of nearly equal numbers.
        bound = max(1.5 * GRADIENT_BOUND[dtype], 1e-10 if dtype == torch.float64 else 2e-4)
        assert relative_error(gradient, exact_gradient) < bound, name


def test_what_no_loss_uses_costs_nothing_and_a_weight_of_zero_changes_nothing():
    case = random_case((9, 500), torch.bfloat16)
    with_entropy = TokenQuestion(*case[:2], entropy=True)
    for weight in (None, 0.0):
        leaf = case[0].clone().requires_grad_()
        found = computer(replace(with_entropy, logits=leaf))
        loss = (found.log_probs * case[2]).sum()
        (loss if weight is None else loss - weight * found.entropy.sum()).backward()
        assert torch.equal(leaf.grad, run(*case)[1])


def test_the_log_probs_are_the_same_bit_for_bit_with_entropy_and_without():
    case = random_case((30, 700), torch.bfloat16)
    assert torch.equal(asked_of(*case[:2]).log_probs, token_logprobs(*case[:2]))


def test_an_entropy_of_a_distribution_far_from_zero_keeps_its_digits():
    logits = torch.randn(3, 200) + 3000.0
    exact, _ = expected_statistics(logits, torch.zeros(3, dtype=torch.long), 1.0, (torch.zeros(3), None, None))
    assert relative_error(asked_of(logits, torch.zeros(3, dtype=torch.long)).entropy, exact[1]) < 1e-6


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_rows_that_nobody_asks_for_get_no_gradient_and_are_not_read(in_place):
    logits, _, _ = random_case((4, 6, 96), torch.bfloat16)
    rows = torch.tensor([0, 1, 2, 6, 12, 13, 23])
    labels = torch.randint(0, 96, rows.shape)
    upstream = [torch.randn(rows.shape) for _ in WHOLE]
    few, few_gradient = gradient_of_all((logits.view(-1, 96)[rows], labels), None, upstream)
    logits.view(-1, 96)[[3, 22]] = float("nan")  # padding
    found, gradient = gradient_of_all((logits, labels), None, upstream, rows=rows, in_place=in_place)
    for one, other in zip(found, few, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gradient.view(-1, 96)[rows], few_gradient)
    others = [row for row in range(24) if row not in rows]
    assert not gradient.view(-1, 96)[others].any()


def test_tokens_that_cannot_be_drawn_add_nothing_to_entropy():
    logits, labels, _ = random_case((4, 32), torch.float32)
    few = logits[:, :20].clone()
    logits[:, 20:] = float("-inf")
    labels.clamp_(max=19)
    upstream = [torch.randn(4) for _ in WHOLE]
    found, gradient = gradient_of_all((logits, labels), 1.3, upstream)
    exact, exact_gradient = gradient_of_all((few, labels), 1.3, upstream)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient[:, :20], exact_gradient)
    assert not gradient[:, 20:].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_has_no_entropy(poison):
    logits, labels, _ = random_case((3, 50), torch.bfloat16)
    logits[1, 7] = poison
    found, gradient = gradient_of_all((logits, labels), 0.9, [torch.ones(3)] * 3)
    for each in found:
        assert torch.isnan(each).tolist() == [False, True, False]
    assert torch.isnan(gradient).any(-1).tolist() == [False, True, False]


def test_logits_that_share_memory_are_not_written_over():
    row, labels, upstream = random_case((1, 40), torch.bfloat16)
    leaf = row.clone().requires_grad_()
    token_logprobs((leaf * 1).expand(5, 40), labels.expand(5), in_place=True).backward(upstream.expand(5))
    _, exact_gradient = expected(row.expand(5, 40), labels.expand(5), upstream.expand(5))
    assert relative_error(leaf.grad[0], exact_gradient.sum(0)) < 2e-2


def test_a_temperature_below_the_lowest_counts_as_the_lowest():
    logits, labels = torch.tensor([[0.0, 1e-9]]), torch.tensor([1])
    assert torch.equal(
        token_logprobs(logits, labels, temperature=0.0), token_logprobs(logits, labels, temperature=1e-8)
    )


def test_a_temperature_that_does_not_fit_is_refused():
    logits, labels, _ = random_case((5, 40), torch.float32)
    with pytest.raises(LogprobsInputError, match=r"temperature \(4,\) does not fit logits \(5, 40\)"):
        token_logprobs(logits, labels, temperature=torch.ones(4))


def test_the_feature_answers_while_it_is_on():
    logits, labels, _ = random_case((4, 8), torch.bfloat16)
    plain = TokenQuestion(logits, labels)
    for _ in range(2):
        feature = Logprobs(Settings.of())
        assert events.token_logprobs.ask(plain) is None
        feature.start()
        assert feature.describe() == {"kernels": {}}
        torch.testing.assert_close(events.token_logprobs.ask(plain).log_probs, token_logprobs(logits, labels))
        assert feature.describe() == {"kernels": {"cpu, bfloat16": "torch"}}
        mine = type("Mine", (torch.Tensor,), {})
        others = replace(plain, logits=logits.as_subclass(mine))
        assert events.token_logprobs.ask(others) is None, "verl's own computes these"
        kernel = replace(plain, verl_computes=lambda: True)
        assert events.token_logprobs.ask(kernel) is None, "verl has a kernel of its own"
        assert events.token_logprobs.ask(replace(kernel, entropy=True)).entropy is not None, "it has none for entropy"
        feature.stop()
        assert feature.describe() == {"kernels": {}}


def test_settings_without_effect_are_told_once(caplog):
    feature = Logprobs(Settings.of())
    feature.start()
    try:
        with caplog.at_level("INFO", "verl_fl_overlay"):
            for _ in range(2):
                logits, labels, _ = random_case((4, 8), torch.bfloat16)
                events.token_logprobs.ask(TokenQuestion(logits, labels, entropy=True, idle=("entropy_checkpointing",)))
    finally:
        feature.stop()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("entropy_checkpointing has no effect")
