"""Layers that keep their activations on a device: what they take is measured, and running out of memory is survived."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.recompute import Recompute  # noqa: E402
from verl_fl_overlay.phase import training  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

LAYERS, TOKENS = 8, 8192


@pytest.fixture
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, attn_implementation="sdpa",
    )  # fmt: skip
    made = Qwen2ForCausalLM(config).to("cuda", torch.bfloat16).train()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield made
    del made
    torch.cuda.empty_cache()


@pytest.fixture
def feature(request):
    made = Recompute(Settings.of(recompute=request.param))
    made.start()
    yield made
    made.stop()


def built(model):
    events.engine_initialized.emit(events.Engine("fsdp", (model,), torch.optim.SGD(model.parameters(), lr=0.0)))


def update(model, tokens=TOKENS):
    """Train on one micro-batch; return the most that was allocated more than at its beginning."""
    ids = torch.arange(tokens, device="cuda").reshape(1, -1) % 1024
    with training.inside("train"):
        model.zero_grad(set_to_none=False)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
        loss.backward()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def at_most(more):
    """Let this process take so many bytes more than it has."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("feature", ["auto"], indirect=True)
def test_auto_measures_what_a_layer_takes_and_then_keeps_all(feature, model):
    update(model)
    recomputing = update(model)
    built(model)
    taken = [update(model) for _ in range(6)]
    (told,) = feature.describe()["models"].values()
    assert (told["layers"], told["recompute"]) == (LAYERS, 0)
    assert taken[0] < 1.05 * recomputing
    cost = (taken[-1] - recomputing) / LAYERS / TOKENS / 1000  # MB of 1,000 tokens, as the report has it
    assert told["MB that a layer keeps of 1,000 tokens"] == pytest.approx(cost, rel=0.3, abs=1)
    assert told["MB of an update, all layers recomputing"] == pytest.approx(recomputing / 1e6, rel=0.1, abs=1)


@pytest.mark.parametrize("feature", [LAYERS // 2], indirect=True)
def test_half_of_the_layers_take_between_none_and_all(feature, model):
    update(model)
    recomputing = update(model)
    built(model)
    half = update(model)
    feature.stop()
    assert recomputing < half
    assert update(model) == pytest.approx(recomputing, rel=0.02)


@pytest.mark.parametrize("feature", ["auto"], indirect=True)
def test_a_forward_that_runs_out_of_memory_runs_once_more(feature, model):
    """What may be taken is less than what auto decided by; no other test on the GPU has less for it."""
    built(model)
    for _ in range(6):
        update(model)
    ids = torch.arange(TOKENS, device="cuda").reshape(1, -1) % 1024
    before = torch.cuda.memory_allocated()
    with training.inside("train"):
        with at_most(300 << 20), pytest.raises(torch.OutOfMemoryError) as caught:
            model(input_ids=ids, use_cache=False)
        assert events.repeats.ask(model, caught.value)
        del caught
        assert torch.cuda.memory_allocated() - before < 64 << 20, "nothing of the failed forward is held"
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    (told,) = feature.describe()["models"].values()
    assert (told["recompute"], told["gave up"]) == (LAYERS, True)
