"""What a hook on verl's engines tells: torch's objects, and by name what a changed verl no longer has."""

from __future__ import annotations

import pytest

from verl_fl_overlay import compat, events
from verl_fl_overlay.compat import engines, legacy_workers
from verl_fl_overlay.errors import HookError


class Model:
    def named_children(self):
        return []


class Verls:
    """An engine as verl makes it: what it is given, under verl's names."""

    __module__ = "verl.workers.engine.fsdp.transformer_impl"

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    monkeypatch.setattr(events, "failures", events.Failures())
    monkeypatch.setattr(engines, "failures", events.failures)
    return events.failures


@pytest.fixture
def initialized():
    told = []
    end = events.engine_initialized.subscribe(told.append)
    yield told
    end()


def hook_of(name: str, release: str = compat.RELEASES[-1]):
    hooks = compat.select(compat.InstalledVerl(release, "")).hooks
    return next(hook for hook in hooks if hook.name == name)


def initialize(engine, name: str = "fsdp") -> None:
    assert hook_of(f"engine.initialize.{name}").wrapper(lambda: "verl's", engine, (), {}) == "verl's"


def test_an_engine_is_told_in_torchs_terms(initialized, failures):
    model, optimizer = Model(), object()
    initialize(Verls(module=model, optimizer=optimizer, _autocast_dtype="torch.bfloat16"))
    assert initialized == [events.Engine("fsdp", (model,), optimizer, "bfloat16")]
    assert failures.told() == {}


def test_each_pipeline_chunk_is_a_model(initialized):
    chunks = [Model(), Model()]
    initialize(Verls(module=chunks, optimizer=None, param_dtype="torch.float16"), "megatron")
    assert initialized == [events.Engine("megatron", tuple(chunks), None, "float16")]


@pytest.mark.parametrize("gone", ["module", "optimizer"])
def test_an_attribute_that_is_gone_is_named_and_the_rest_is_told(initialized, failures, gone):
    attributes = {"module": Model(), "optimizer": object(), "_autocast_dtype": "torch.bfloat16"}
    del attributes[gone]
    for _ in range(2):
        initialize(Verls(**attributes))
    (where, said), *others = failures.told().items()
    assert not others, "it is told once"
    assert where == f"verl.workers.engine.fsdp.transformer_impl.Verls.{gone}"
    assert f"has no attribute {gone}" in said
    engine = initialized[-1]
    assert engine.models == ((attributes["module"],) if "module" in attributes else ())
    assert engine.optimizer is attributes.get("optimizer")


def test_a_floating_type_that_is_gone_is_not_told(initialized, failures):
    """verl's own code takes it for optional: a subclass may lack it."""
    initialize(Verls(module=Model(), optimizer=None))
    assert (initialized[-1].mixed_precision, failures.told()) == ("", {})


def test_what_a_property_raises_does_not_reach_verl(initialized, failures):
    class Lazy(Verls):
        @property
        def module(self):
            raise RuntimeError("not yet")

    initialize(Lazy(optimizer="an optimizer"))
    assert initialized[-1].optimizer == "an optimizer"
    assert "raises RuntimeError('not yet') for module" in next(iter(failures.told().values()))


def test_under_strict_the_process_stops_at_it(failures):
    failures.begin(strict=True)
    with pytest.raises(HookError, match="has no attribute module"):
        initialize(Verls(optimizer=None, _autocast_dtype=None))


@pytest.mark.parametrize(
    ("modules", "registered", "backend"),
    [
        (["mindspeed", "megatron"], "megatron", "megatron"),
        (["veomni", "fsdp"], "veomni", "veomni"),
        (["fsdp.fsdp_turbo_impl", "fsdp"], "fsdp_turbo", "fsdp"),
        ([], "somebodys", "somebodys"),
        (["acme.megatron_engine"], "acme_mcore", "megatron"),
    ],
)
def test_the_backend_is_that_of_the_class_that_is_inherited(modules, registered, backend):
    cls: type = object
    for module in reversed(modules):
        home = module if "." in module else f"{module}.transformer_impl"
        home = home if module.startswith("acme") else f"verl.workers.engine.{home}"
        cls = type("Engine", (cls,), {"__module__": home})
    told = []
    end = events.engine_built.subscribe(told.append)
    hook_of("engine.new").wrapper(lambda *args: type("Engine", (cls,), {})(), None, ("language_model", registered), {})
    end()
    assert told == [events.Engine(backend)]


class Optimizer:
    param_groups = ()


@pytest.mark.parametrize(
    ("second", "told"), [(Optimizer, True), (lambda: None, False), (lambda: {"a": "configuration"}, False)]
)
def test_a_worker_that_does_without_an_engine_is_told_too(initialized, second, told):
    """Megatron's reference worker returns its configuration where the others return an optimizer."""
    built = ([Model()], second())
    hook = next(hook for hook in legacy_workers.hooks() if hook.name == "legacy.megatron.build_model_optimizer")
    assert hook.wrapper(lambda: built, object(), (), {}) is built
    (engine,) = initialized
    assert (engine.models, engine.backend) == (tuple(built[0]), "megatron")
    assert engine.optimizer is (built[1] if told else None)
