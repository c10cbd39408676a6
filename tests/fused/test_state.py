"""A module's state decides with its inputs and weights what it computes: each state is checked on its own."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from fused.test_lookalikes import MLP, Norm  # noqa: E402
from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.fused import Fused  # noqa: E402
from verl_fl_overlay.kernels import agreement as fused_check  # noqa: E402
from verl_fl_overlay.kernels import state  # noqa: E402
from verl_fl_overlay.kernels.model import FusedModules  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

VALUES = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) + 1


class Limited(Norm):
    """A norm that clamps where it was given a limit."""

    def forward(self, x):
        return super().forward(x if self.limited_to() is None else x.clamp(-self.limited_to(), self.limited_to()))

    def limited_to(self):
        return getattr(self, "limit", None)


class LimitedByDict(Limited):
    def __init__(self, size):
        super().__init__(size)
        self.limits = {"all": [None]}

    def limited_to(self):
        return self.limits["all"][0]


class LimitedByConfig(Limited):
    def __init__(self, size):
        super().__init__(size)
        self.config = types.SimpleNamespace(limit=None)

    def limited_to(self):
        return self.config.limit


def own(module, values=VALUES):
    """Return what the module gives without a kernel: a copy is not fused."""
    twin = object.__new__(type(module))
    twin.__dict__ = dict(vars(module))
    return twin(values)


CHANGES = {
    Limited: lambda norm: setattr(norm, "limit", 0.5),
    LimitedByDict: lambda norm: norm.limits["all"].__setitem__(0, 0.5),
    LimitedByConfig: lambda norm: setattr(norm.config, "limit", 0.5),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_limit_that_is_set_later_counts_from_the_next_call(kind, kernels, fuse, agreement):
    norm = kind(8)
    fuse(norm)
    before = norm(VALUES)
    assert set(agreement.checks().values()) == {"same"}
    CHANGES[kind](norm)
    assert not torch.allclose(own(norm), before)
    torch.testing.assert_close(norm(VALUES), own(norm), rtol=0, atol=0)
    assert "differs by" in agreement.checks()[f"rms_norm in {kind.__name__}, float32"]


@pytest.mark.parametrize("kind", CHANGES)
def test_a_second_instance_with_another_limit_computes_with_it(kind, kernels, fuse):
    norms = [kind(8) for _ in range(2)]
    CHANGES[kind](norms[1])
    for norm in norms:
        fuse(norm)
        torch.testing.assert_close(norm(VALUES), own(norm))


def test_an_epsilon_that_is_changed_later_is_computed_with(kernels, fuse):
    norm = Norm(8)
    fuse(norm)
    norm(VALUES)
    norm.variance_epsilon = 1.0
    torch.testing.assert_close(norm(VALUES), own(norm))
    assert kernels.calls["norm"] == 4, "twice the check and itself"
    norm.variance_epsilon = None
    with pytest.raises(TypeError):
        norm(VALUES)


def test_what_is_done_in_training_alone_is_seen(kernels, fuse):
    class Noisy(Norm):
        def forward(self, x):
            return super().forward(x) * (3 if self.training else 1)

    norm = Noisy(8).eval()
    fuse(norm)
    for training in (False, True, False):
        norm.train(training)
        torch.testing.assert_close(norm(VALUES), own(norm))


def test_instances_of_one_state_are_checked_once(kernels, fuse):
    for _ in range(3):
        norm = LimitedByDict(8)
        fuse(norm)
        norm(VALUES)
    assert kernels.calls["norm"] == 3 + 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.ones(()), "its state holds a Tensor"),
        ([nn.Linear(2, 2)], "its state holds a Linear"),
        ({"a": (object(),)}, "its state holds a object"),
        (nn.Linear(2, 2).forward, "its state holds a method"),
        (frozenset({1}), "same"),
        (slice(1, 2), "its state holds a slice"),
    ],
    ids=["tensor", "modules", "objects", "method", "set", "slice"],
)
def test_state_whose_changes_could_not_be_seen_keeps_a_norm_native(value, told, kernels, fuse, agreement):
    norm = Norm(8)
    vars(norm)["more"] = value
    fuse(norm)
    for _ in range(2):
        torch.testing.assert_close(norm(VALUES), own(norm))
    assert next(iter(agreement.checks().values())).startswith(told)
    assert bool(kernels.calls["norm"]) == (told == "same")


def test_an_activation_s_own_state_counts(kernels, fuse, agreement):
    class Leaky(nn.Module):
        def __init__(self, beta):
            super().__init__()
            self.beta = beta

        def forward(self, x):
            return x * torch.sigmoid(self.beta * x)

    for beta in (1.0, 1.5):
        mlp = MLP(Leaky(beta))
        fuse(mlp)
        torch.testing.assert_close(mlp(VALUES), own(mlp))
    assert kernels.calls["gated"] == 2, "the check of the one that has a kernel, and itself"
    weighted = MLP(nn.PReLU())
    fuse(weighted)
    torch.testing.assert_close(weighted(VALUES), own(weighted))
    assert kernels.calls["gated"] == 2
    kept = MLP(nn.Sequential(Leaky(1.0)))
    fuse(kept)
    kept(VALUES)
    kept.act_fn[0].beta = 2.0
    torch.testing.assert_close(kept(VALUES), own(kept))


def test_the_check_neither_takes_random_numbers_nor_goes_by_them(kernels, fuse):
    class Dropping(Norm):
        def forward(self, x):
            return functional.dropout(super().forward(x), 0.1, self.training)

    told = []
    for seed in range(3):
        norm, agreement = Dropping(8), fused_check.Agreement()
        torch.manual_seed(seed)
        expected, after = own(norm), torch.get_rng_state()
        made = FusedModules(("rms_norm",), agreement)
        made.fuse(norm)
        torch.manual_seed(seed)
        torch.testing.assert_close(norm(VALUES), expected, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), after)
        told.append(agreement.checks()["rms_norm in Dropping, float32"])
        made.remove()
    assert "differs by" in told[0]
    assert told[1:] == told[:2], "the same, whatever was seeded"


def test_a_norm_that_keeps_something_of_each_call_runs_itself(kernels, fuse, agreement):
    class Counting(Norm):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    norm = Counting(8)
    fuse(norm)
    for _ in range(3):
        norm(VALUES)
    assert norm.calls == 3
    assert "changes its own attributes" in agreement.checks()["rms_norm in Counting, float32"]


def test_a_state_that_changes_from_call_to_call_is_not_checked_for_ever(kernels, fuse, agreement, monkeypatch, caplog):
    monkeypatch.setattr(fused_check, "MOST_CHECKS", 3)
    norm = Norm(8)
    fuse(norm)
    for norm.number in range(6):
        torch.testing.assert_close(norm(VALUES), own(norm))
    assert kernels.calls["norm"] == 3 + 3
    assert agreement.checks() == {"rms_norm in Norm, float32": "its state changes too often, it was checked 3 times"}
    assert len(caplog.records) == 1


def test_modules_that_fsdp2_shards_on_their_own_are_checked_once_and_are_not_kept(kernels, fuse):
    """As FSDP2 leaves them: it writes an object of its own, which knows the model, into each."""
    norms = [Norm(8) for _ in range(3)]
    for norm in norms:
        vars(norm)["__composable_api_state_key_1"] = types.SimpleNamespace(modules=norms)
        fuse(norm)
        norm(VALUES)
    assert kernels.calls["norm"] == 3 + 1
    dropped = weakref.ref(norm)
    del norm, norms
    gc.collect()
    assert dropped() is None


def test_a_pickled_module_runs_natively_where_it_is_loaded(kernels, fuse):
    norm = Norm(8)
    fuse(norm)
    loaded = pickle.loads(pickle.dumps(norm))
    torch.testing.assert_close(loaded(VALUES), own(norm), rtol=0, atol=0)
    assert not kernels.calls["norm"]


def test_a_class_that_makes_other_objects_than_its_own_is_checked_all_the_same(kernels, fuse, agreement):
    """FSDP2 gives a module that it shards a class whose ``__new__`` takes that module's arguments apart."""

    class Sharded(Norm):
        def __new__(cls, *args, **kwargs):
            raise AssertionError("a copy was made")

    norm = Norm(8)
    norm.__class__ = Sharded
    fuse(norm)
    torch.testing.assert_close(norm(VALUES), own(norm))
    assert agreement.checks() == {"rms_norm in Sharded, float32": "same"}


def test_a_key_tells_apart_what_python_takes_for_equal():
    assert state.of(1) != state.of(True)
    assert state.of(1) != state.of(1.0)
    assert state.of([1]) != state.of((1,))
    assert state.of({"a": 1}) != state.of({"a": 2})
    assert state.of(nn.SiLU()) == state.of(nn.SiLU())
    assert state.of(nn.SiLU()) != state.of(nn.SiLU(inplace=True))
    one = types.SimpleNamespace(a=torch.ones(3))
    before = state.of(one)
    assert before == state.of(one)
    assert before != state.of(copy.copy(one)), "another object"
    one.a = torch.ones(3)
    assert before != state.of(one), "another tensor, which cannot be compared"


def test_a_forward_that_somebody_sets_later_is_left_when_ours_is_taken_out(kernels, fuse):
    norms = nn.Sequential(Norm(8), Norm(8))
    made = fuse(norms)

    def theirs(x):
        return x

    norms[0].forward = theirs
    made.remove()
    assert norms[0].forward is theirs
    assert "forward" not in vars(norms[1])


def test_after_stop_and_a_new_start_nothing_of_the_first_run_is_left(kernels):
    model, told = MLP(), []
    for _ in range(2):
        fused = Fused(Settings.of(fused=("auto",)))
        told.append(fused.describe())
        fused.start()
        events.engine_initialized.emit(events.Engine("fsdp", (model,)))
        model(VALUES)
        told.append(fused.describe())
        calls = dict(kernels.calls)
        fused.stop()
        fused.stop()
        told.append(fused.describe())
        model(VALUES)
        assert kernels.calls == calls
        events.engine_initialized.emit(events.Engine("fsdp", (model,)))
        assert "forward" not in vars(model)
    nothing = {"found": {}, "replaced": {}, "checks": {}}
    used = {"found": {"gated_mlp": 1}, "replaced": {"gated_mlp": 1}, "checks": {"gated_mlp in MLP, float32": "same"}}
    assert told == [nothing, used, nothing] * 2
    assert kernels.calls["gated"] == 4, "each run has a check of its own"
