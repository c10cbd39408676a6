"""How many layers auto lets keep their activations, with a memory that is made of numbers."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from recompute.test_layers import Model, built  # noqa: E402
from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.devices import memory  # noqa: E402
from verl_fl_overlay.features import recompute  # noqa: E402
from verl_fl_overlay.phase import training  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

PER_TOKEN, KEPT = 100.0, 40.0


class Trained(Model):
    """A model that is called with tokens, and the memory that it takes: 100 a token, and 40 for each kept layer."""

    def __init__(self, left: float, weights: float = 1000) -> None:
        super().__init__()
        self.enable()
        self.left, self.weights, self.held, self.most, self.restarts = left, weights, 0.0, 0.0, 0
        for layer in self.layers:
            layer.register_forward_hook(self.ran)

    def forward(self, input_ids):
        self.tokens, self.held = input_ids.numel(), 0.0
        return super().forward((input_ids[..., None] / 100).expand(-1, 4).clone().requires_grad_())

    def ran(self, layer, args, output):
        if torch.is_grad_enabled() and layer.training and not layer.gradient_checkpointing:
            self.held += self.tokens * KEPT
        self.most = max(self.most, self.tokens * PER_TOKEN + self.held)

    def allocated(self):
        return self.weights + self.held

    def peak(self):
        return self.weights + self.most

    def restart_peak(self):
        self.most, self.restarts = 0.0, self.restarts + 1

    def available(self):
        return self.left

    def total(self):
        return self.left


@pytest.fixture
def auto(monkeypatch):
    """Return a function that builds a model with so much memory left, under a feature that is started."""
    made = recompute.Recompute(Settings.of(recompute="auto"))
    made.start()

    def build(left: float) -> Trained:
        model = Trained(left)
        monkeypatch.setattr(recompute, "device_memory", lambda: model)
        built(model)
        return model

    build.feature = made
    yield build
    made.stop()
    events.failures.begin(strict=False)


def update(model, *lengths):
    """Train on micro-batches of so many tokens; return how many layers kept their activations in each."""
    kept = []
    with training.inside("train"):
        for tokens in lengths:
            for layer in model.layers:
                layer.calls = 0
            model(torch.arange(tokens)).sum().backward()
            kept.append([layer.calls for layer in model.layers].count(1))
    return kept


def test_it_begins_with_all_and_measures(auto):
    model = auto(1e6)
    assert [update(model, 16, 8) for _ in range(6)] == [[0, 0], [0, 0], [1, 1], [4, 4], [4, 4], [4, 4]]
    assert model.restarts == 1, "the peak, which verl reports, is counted anew once"
    (told,) = auto.feature.describe()["models"].values()
    assert told["layers"] == 4
    assert told["recompute"] == 0
    assert told["updates"] == 6
    assert told["gave up"] is False


# 16 tokens take 1,600, and 640 for each layer; less than twice 1,600 is not even tried.
@pytest.mark.parametrize(("left", "expected"), [(3300, 0), (3500, 2), (3900, 3), (4500, 4)])
def test_as_many_as_fit_keep_theirs(auto, left, expected):
    model = auto(left)
    found = [update(model, 16) for _ in range(5)][-1]
    assert found == [expected]
    needed = 16 * PER_TOKEN + expected * 16 * KEPT
    assert needed <= left * 15 / 16
    assert expected in (0, 4) or needed + 16 * KEPT > left * 15 / 16, "one more does not fit"


def test_a_longer_micro_batch_keeps_fewer_layers(auto):
    model = auto(6000)
    for _ in range(4):
        update(model, 16)
    assert update(model, 16, 32, 48, 60, 4) == [4, 1, 0, 0, 4]


def test_what_others_take_meanwhile_is_counted(auto):
    model = auto(6000)
    assert [update(model, 16) for _ in range(4)][-1] == [4]
    model.left = 2000
    assert update(model, 16) == [0]
    model.left = 6000
    assert update(model, 16) == [4]


def test_inference_is_left_alone(auto):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    flags = [layer.gradient_checkpointing for layer in model.layers]
    with training.inside("eval"), torch.no_grad():
        model.eval()
        model(torch.arange(1000))
        model.train()
        model(torch.arange(1000))
    assert [layer.gradient_checkpointing for layer in model.layers] == flags
    assert auto.feature.describe()["models"]["Trained"]["updates"] == 4


def test_a_layer_that_costs_more_than_the_first_one_is_seen_in_time(auto, monkeypatch):
    """Layers before the last one keep ten times as much; 4 of them would not fit."""
    model = auto(9000)
    monkeypatch.setattr(model.layers[0], "calls", 0)
    ran = model.ran

    def costly(layer, args, output):
        ran(layer, args, output)
        if layer is not model.layers[-1] and not layer.gradient_checkpointing:
            model.held += 9 * model.tokens * KEPT
            model.most = max(model.most, model.tokens * PER_TOKEN + model.held)

    for layer in model.layers:
        layer.register_forward_hook(costly, prepend=True)
    found = [update(model, 16) for _ in range(3)]
    assert found == [[0], [0], [1]]


def out_of_memory(*given):
    raise torch.OutOfMemoryError("no memory, says the test")


def run_out(model, *, asks: bool):
    """Fail in the forward of the last layer; return whether the hook on verl's forward is to repeat it."""
    handle = model.layers[-1].register_forward_pre_hook(out_of_memory)
    try:
        model(torch.arange(16))
    except torch.OutOfMemoryError as error:
        return events.repeats.ask(model, error) if asks else None
    finally:
        handle.remove()


def test_out_of_memory_lets_all_recompute_for_good_and_repeats(auto, caplog):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    with caplog.at_level(logging.WARNING, "verl_fl_overlay"):
        assert run_out(model, asks=True) is True
        assert run_out(model, asks=True) is False, "none keeps its activations, so nothing would change"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "ran out of memory in Trained; the micro-batch is repeated, and all layers recompute from now on" in said
    assert [update(model, 16) for _ in range(3)] == [[0]] * 3
    assert auto.feature.describe()["models"]["Trained"]["gave up"] is True


def test_a_step_that_fails_lets_all_recompute(auto, caplog):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    with pytest.raises(torch.OutOfMemoryError), training.inside("train"), training.inside("train_batch"):
        out_of_memory()
    assert [record.getMessage() for record in caplog.records] == [
        "VERL_FL_RECOMPUTE=auto ran out of memory in training; all layers recompute from now on"
    ]
    assert update(model, 16) == [0]


def test_another_error_changes_nothing(auto):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    with pytest.raises(ValueError, match="of the user"), training.inside("train"):
        raise ValueError("of the user")
    assert events.repeats.ask(model, ValueError("of the user")) is False
    assert events.repeats.ask(None, torch.OutOfMemoryError("of a model of others")) is False
    with torch.no_grad():
        assert events.repeats.ask(model, torch.OutOfMemoryError("while verl infers")) is False
    assert update(model, 16) == [4]


def test_a_memory_that_fails_is_told_and_training_goes_on(auto):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    model.available = out_of_memory
    assert [update(model, 16) for _ in range(2)] == [[0], [0]]
    assert "the memory budget of Trained" in events.failures.told()


def test_without_a_memory_all_recompute(monkeypatch, auto, caplog):
    model = Trained(1e6)
    monkeypatch.setattr(recompute, "device_memory", lambda: None)
    built(model)
    assert "torch does not tell of this device's memory" in caplog.text
    assert [update(model, 16) for _ in range(5)][-1] == [0]


def test_a_device_tells_of_its_memory(monkeypatch):
    numbers = {"memory_allocated": 30, "memory_reserved": 50, "max_memory_allocated": 40}
    told = {name: lambda value=value: value for name, value in numbers.items()}
    module = SimpleNamespace(**told, mem_get_info=lambda: (20, 100), reset_peak_memory_stats=lambda: None)
    monkeypatch.setattr(memory, "accelerator", lambda: module)
    found = memory.device_memory()
    assert (found.allocated(), found.peak(), found.total()) == (30, 40, 100)
    assert found.available() == 20 + 50 - 30, "what torch keeps is this process's too"
    del module.mem_get_info
    assert memory.device_memory() is None
    monkeypatch.setattr(memory, "accelerator", lambda: None)
    assert memory.device_memory() is None


def test_nothing_is_left_of_it(auto):
    model = auto(1e6)
    for _ in range(4):
        update(model, 16)
    hooks = sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.layers)
    assert (hooks, len(model._forward_pre_hooks)) == (4 + 2, 1)
    auto.feature.stop()
    hooks = sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.layers)
    assert (hooks, len(model._forward_pre_hooks)) == (4, 0)
    assert [layer.gradient_checkpointing for layer in model.layers] == [True] * 4


def test_a_model_that_verl_drops_is_not_kept(auto, monkeypatch):
    device = SimpleNamespace(**{name: lambda: 10**6 for name in ("allocated", "peak", "available", "total")})
    device.restart_peak = lambda: None
    monkeypatch.setattr(recompute, "device_memory", lambda: device)
    model = Trained(0)
    built(model)
    assert [update(model, 16) for _ in range(3)] == [[0], [0], [1]]
    dropped = weakref.ref(model), weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert [each() for each in dropped] == [None, None]
