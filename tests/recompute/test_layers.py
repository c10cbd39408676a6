"""The switch of layers that recompute, by structure, on models of torch's own parts."""

from __future__ import annotations

import functools
import gc
import logging
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: E402
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint  # noqa: E402

from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.errors import SettingsError  # noqa: E402
from verl_fl_overlay.features.recompute import Recompute  # noqa: E402
from verl_fl_overlay.kernels.recompute import Layers  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402


class Layer(nn.Module):
    """A layer that counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, hidden):
        self.calls += 1
        return torch.tanh(self.linear(hidden)) + hidden


class Checkpointing(Layer):
    """A layer that checkpoints itself, as those of transformers do."""

    gradient_checkpointing = False

    def __call__(self, *args):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(super().__call__, *args)
        return super().__call__(*args)


class Model(nn.Module):
    """Checkpoints as transformers does: the model and its layers have the flag; ``old``: the model checkpoints."""

    def __init__(self, old: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((Layer if old else Checkpointing)() for _ in range(4))
        self.old, self.gradient_checkpointing = old, False

    def enable(self, reentrant: bool = False) -> Model:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
                module.gradient_checkpointing = True
        return self

    def forward(self, hidden):
        for layer in self.layers:
            if self.old and self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer, hidden)
            else:
                hidden = layer(hidden)
        return hidden


def wrapped(kind: CheckpointImpl) -> Model:
    model = Model(old=True)
    model.layers = nn.ModuleList(checkpoint_wrapper(layer, kind) for layer in model.layers)
    return model


MODELS = {
    "layers": lambda: Model().enable(),
    "reentrant layers": lambda: Model().enable(reentrant=True),
    "wrapper": lambda: wrapped(CheckpointImpl.NO_REENTRANT),
    "reentrant wrapper": lambda: wrapped(CheckpointImpl.REENTRANT),
}


def step(model):
    """Return how often each layer ran in one step, and the gradients."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.calls = 0
    model.zero_grad()
    model(torch.arange(12.0).reshape(3, 4).requires_grad_() / 12).sum().backward()
    return [layer.calls for layer in layers], [parameter.grad.clone() for parameter in model.parameters()]


def state(model):
    return [
        {name: vars(module).get(name) for name in ("gradient_checkpointing", "checkpoint_fn", "forward")}
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layers_run_once_and_the_gradients_stay(name):
    model = MODELS[name]()
    before, (calls, expected) = state(model), step(model)
    assert calls == [2, 2, 2, 2]
    layers = Layers(model)
    assert len(layers) == 4
    for kept in (1, 4, 3, 0):
        layers.keep(kept)
        calls, gradients = step(model)
        assert calls == [2] * (4 - kept) + [1] * kept
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert state(model) == before


def test_a_model_that_checkpoints_in_its_own_forward_is_one_layer():
    model = Model(old=True).enable()
    layers = Layers(model)
    assert len(layers) == 1
    assert layers[0] is model
    layers.keep(1)
    assert step(model)[0] == [1, 1, 1, 1]
    layers.keep(0)
    assert step(model)[0] == [2, 2, 2, 2]


def test_without_checkpointing_there_are_none():
    assert len(Layers(Model())) == 0
    assert len(Layers(Model(old=True))) == 0


def test_what_others_turned_off_meanwhile_stays_off():
    model = Model().enable()
    layers = Layers(model)
    layers.keep(2)
    model.layers[3].gradient_checkpointing = False
    model.layers[0].gradient_checkpointing = False
    layers.keep(0)
    assert [layer.gradient_checkpointing for layer in model.layers] == [False, True, True, False]


def test_a_model_that_is_saved_whole_has_no_part_of_the_overlay(tmp_path):
    model = Model().enable()
    Layers(model).keep(2)
    torch.save(model, tmp_path / "model")
    assert b"verl_fl_overlay" not in (tmp_path / "model").read_bytes()


@pytest.fixture
def feature(request):
    made = Recompute(Settings.of(recompute=request.param))
    made.start()
    yield made
    made.stop()


def built(*models, backend="fsdp", optimizer=True):
    events.engine_initialized.emit(events.Engine(backend, models, optimizer or None))


@pytest.mark.parametrize("feature", [1], indirect=True)
def test_a_number_is_of_the_layers_that_recompute(feature):
    actor, critic, reference = Model().enable(), Model().enable(), Model().enable()
    built(actor)
    built(critic)
    built(reference, optimizer=False)
    assert [step(model)[0] for model in (actor, critic, reference)] == [[2, 1, 1, 1], [2, 1, 1, 1], [2, 2, 2, 2]]
    told = {"layers": 4, "recompute": 1}
    assert feature.describe() == {"asked for": 1, "models": {"Model": told, "Model'": told}}
    feature.stop()
    assert step(actor)[0] == step(critic)[0] == [2, 2, 2, 2]
    assert feature.describe()["models"] == {}


@pytest.mark.parametrize("feature", [200], indirect=True)
def test_a_number_above_the_layers_is_an_error(feature):
    with pytest.raises(
        SettingsError, match=r"VERL_FL_RECOMPUTE=200: Model has 4 layers .* from 0 to 4, all, none, or a"
    ):
        built(Model().enable())


@pytest.mark.parametrize("feature", [0, 200, "auto"], indirect=True)
def test_a_model_without_such_layers_is_told_once(feature, caplog):
    with caplog.at_level(logging.WARNING, "verl_fl_overlay"):
        for _ in range(2):
            built(Model(), backend="megatron")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "does nothing in Model of the engine megatron" in said


@pytest.mark.parametrize("feature", [0], indirect=True)
def test_a_model_that_verl_drops_is_not_kept(feature):
    model = Model().enable()
    model.layers[0].register_forward_hook(model.forward)  # FSDP's hooks hold the whole model too
    built(model)
    dropped = weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None
    assert feature.describe()["models"] == {}
