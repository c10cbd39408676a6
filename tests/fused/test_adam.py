"""The fused step of Adam and AdamW: taken where nobody chose otherwise, equal in numbers, absent from checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from processes import OVERLAY, result, warm  # noqa: E402

from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.fused import Fused  # noqa: E402
from verl_fl_overlay.kernels import agreement as fused_check  # noqa: E402
from verl_fl_overlay.kernels.adam import FusedAdam  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

KERNELS = {torch.optim.Adam: "_fused_adam_", torch.optim.AdamW: "_fused_adamw_"}


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of torch's fused kernels, which it has for the CPU too."""
    counts = dict.fromkeys(KERNELS.values(), 0)

    def counting(name, kernel):
        def call(*args, **kwargs):
            counts[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(torch, name, counting(name, getattr(torch, name)))
    monkeypatch.setattr(fused_check, "NATIVE_DEVICES", ())
    return counts


@pytest.fixture
def adam(agreement):
    made = FusedAdam(agreement)
    yield made
    made.remove()


def make(kind=torch.optim.AdamW, dtype=torch.float32, **options):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((5, 3), (7,), ())]
    return kind(parameters, lr=1e-2, weight_decay=0.1, **options)


def steps(optimizer, count=3, seed=1):
    """Step, and return the parameters."""
    torch.manual_seed(seed)
    parameters = optimizer.param_groups[0]["params"]
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def saved(optimizer):
    """Return the state dict as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
def test_the_kernel_is_used_and_gives_torch_s_numbers(kind, options, calls, adam, agreement):
    expected = steps(make(kind, **options))
    optimizer = make(kind, **options)
    assert adam.fuse(optimizer)
    torch.testing.assert_close(steps(optimizer), expected, rtol=1e-6, atol=1e-6)
    name = KERNELS[kind]
    assert calls == {**dict.fromkeys(KERNELS.values(), 0), name: 3 + 3}, "of the check, and its own"
    assert agreement.checks() == {f"adam in {kind.__name__}, float32": "same"}


@pytest.mark.parametrize("chosen", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_what_the_user_chose_stays(chosen, calls, adam):
    optimizer = make(**chosen)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    assert not adam.fuse(optimizer)
    steps(optimizer)
    assert not any(calls.values())
    assert optimizer.state_dict()["param_groups"] == before


def test_other_optimizers_and_none_are_left_alone(adam):
    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    parameters = [torch.nn.Parameter(torch.ones(2))]
    graphed = make(capturable=True), make(differentiable=True)
    for other in (None, torch.optim.SGD(parameters), Mine(parameters), SimpleNamespace(optimizer=1), *graphed):
        assert not adam.fuse(other)


def test_a_checkpoint_is_the_one_that_torch_would_write(calls, adam):
    plain, optimizer = make(), make()
    steps(plain)
    adam.fuse(optimizer)
    steps(optimizer)
    found, expected = saved(optimizer), saved(plain)
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-6, atol=1e-6)
    assert calls["_fused_adamw_"]


def test_a_checkpoint_written_without_the_overlay_goes_on_with_the_kernel(calls, adam):
    plain = make()
    steps(plain)
    file = saved(plain)
    expected = steps(plain, seed=2)
    optimizer = make()
    adam.fuse(optimizer)
    with torch.no_grad():
        for parameter, value in zip(optimizer.param_groups[0]["params"], steps(make()), strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(file)
    before = calls["_fused_adamw_"]
    torch.testing.assert_close(steps(optimizer, seed=2), expected, rtol=1e-6, atol=1e-6)
    assert calls["_fused_adamw_"] == before + 3 + 3


def test_states_that_verl_offloaded_are_brought_back(calls, adam, monkeypatch):
    optimizer = make()
    adam.fuse(optimizer)
    steps(optimizer)
    for state in optimizer.state.values():
        state["step"] = state["step"].to("meta")  # elsewhere than its parameter, as after verl's offloading
    moved = []

    def to(self, device, dtype):
        moved.append((self.device.type, device.type, dtype))
        return torch.tensor(3.0)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        steps(optimizer, 1)
    assert moved == [("meta", "cpu", torch.float32)] * 3


def test_a_step_in_another_type_becomes_the_kernel_s(calls, adam):
    plain, optimizer = make(), make()
    steps(plain)
    file = saved(plain)
    for state in file["state"].values():
        state["step"] = state["step"].double()
    adam.fuse(optimizer)
    optimizer.load_state_dict(file)
    steps(optimizer, 1)
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_a_choice_that_a_checkpoint_brings_is_kept(calls, adam):
    for chosen in ({"foreach": True}, {"fused": False}, {"fused": True}):
        other = make(**chosen)
        steps(other)
        optimizer = make()
        adam.fuse(optimizer)
        optimizer.load_state_dict(saved(other))
        before = calls["_fused_adamw_"]
        steps(optimizer)
        assert calls["_fused_adamw_"] == before + (3 if chosen.get("fused") else 0), chosen
        assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"], chosen
        adam.remove()
        assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"], chosen


def test_a_group_that_cannot_use_the_kernel_stays_native_beside_one_that_can(calls, adam):
    def make_groups():
        torch.manual_seed(0)
        mixed = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
        return torch.optim.AdamW([{"params": mixed}, {"params": [torch.nn.Parameter(torch.randn(4))]}])

    plain, optimizer = make_groups(), make_groups()
    assert adam.fuse(optimizer)
    for each in (plain, optimizer):
        for parameter in (parameter for group in each.param_groups for parameter in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        each.step()
    assert [group["fused"] for group in optimizer.param_groups] == [None, True]
    for one, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
        torch.testing.assert_close(one["params"], other["params"], rtol=1e-6, atol=1e-6)
    chosen = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]}])
    chosen.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "foreach": True})
    assert not adam.fuse(chosen), "its user chose for one of its groups"


def test_frozen_parameters_do_not_decide_and_get_no_state(calls, adam):
    frozen = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    unused, trained = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([frozen, unused, trained])
    adam.fuse(optimizer)
    for _ in range(2):
        trained.grad = torch.ones(4)
        optimizer.step()
    assert calls["_fused_adamw_"] == 3 + 2
    assert list(optimizer.state) == [trained]


def test_parameters_of_two_meshes_stay_native(calls, adam):
    """As expert parallelism has them; torch 2.8's kernel refuses them."""
    optimizer = make()
    for parameter, mesh in zip(optimizer.param_groups[0]["params"], ("experts", "all", "all"), strict=True):
        parameter.device_mesh = mesh
    adam.fuse(optimizer)
    steps(optimizer)
    assert not any(calls.values())
    assert optimizer.param_groups[0]["fused"] is None


def test_removal_leaves_torch_s_own_step(calls, adam):
    plain, optimizer = make(), make()
    adam.fuse(optimizer)
    steps(plain), steps(optimizer)
    adam.remove()
    calls["_fused_adamw_"] = 0
    torch.testing.assert_close(steps(optimizer), steps(plain), rtol=1e-6, atol=1e-6)
    assert not any(calls.values())
    assert optimizer.param_groups[0]["fused"] is None
    assert adam.fuse(optimizer), "it can be fused again"
    assert not adam.fuse(optimizer), "it is"


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"amsgrad": False}, {"maximize": False}], ids=str)
@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
def test_a_kernel_with_other_numbers_is_not_used(kind, wrong, calls, adam, monkeypatch, caplog, agreement):
    right = getattr(torch, KERNELS[kind])
    monkeypatch.setattr(torch, KERNELS[kind], lambda *args, **options: right(*args, **{**options, **wrong}))
    given = {name: True for name in wrong if name in ("amsgrad", "maximize")}
    expected = steps(make(kind, **given))
    optimizer = make(kind)
    adam.fuse(optimizer)
    steps(optimizer)  # without these options the same kernel may be right, which speaks for them alone
    optimizer = make(kind, **given)
    adam.fuse(optimizer)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(steps(optimizer), expected, rtol=0, atol=0)
    assert agreement.checks()[f"adam in {kind.__name__}, float32"] != "same"
    assert sum(f"adam of {kind.__name__} stays native" in record.message for record in caplog.records) == 1
    assert optimizer.param_groups[0]["fused"] is None, "anything else would keep torch from its own fast default"


OTHER_NUMBERS = {
    "no epsilon": {"eps": 0.0},
    "half of epsilon": {"eps": 0.05},
    "another beta of the mean": {"beta1": 0.9},
    "another beta of the squares": {"beta2": 0.7},
    "no decay": {"weight_decay": 0.0},
    "half the decay": {"weight_decay": 0.05},
}
"""What a wrong kernel makes of the numbers that the check gives to it."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", OTHER_NUMBERS)
@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
def test_a_kernel_with_other_numbers_is_seen_in_every_type(kind, wrong, dtype, calls, adam, monkeypatch, agreement):
    right = getattr(torch, KERNELS[kind])
    change = OTHER_NUMBERS[wrong]
    monkeypatch.setattr(torch, KERNELS[kind], lambda *args, **options: right(*args, **{**options, **change}))
    optimizer = make(kind, dtype)
    adam.fuse(optimizer)
    steps(optimizer, 1)
    assert "output 0 differs" in agreement.checks()[f"adam in {kind.__name__}, {str(dtype).removeprefix('torch.')}"]
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)
def test_torch_s_own_kernel_agrees_in_every_type(kind, options, dtype, calls, adam, agreement):
    optimizer = make(kind, dtype, **options)
    adam.fuse(optimizer)
    steps(optimizer, 1)
    assert set(agreement.checks().values()) == {"same"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_amsgrad_that_forgets_its_maximum_is_seen_in_every_type(dtype, calls, adam, monkeypatch, agreement):
    right = torch._fused_adamw_

    def forgetful(params, grads, means, squares, largest, counts, **options):
        return right(params, grads, means, squares, [], counts, **{**options, "amsgrad": False})

    monkeypatch.setattr(torch, "_fused_adamw_", forgetful)
    optimizer = make(dtype=dtype, amsgrad=True)
    adam.fuse(optimizer)
    steps(optimizer, 1)
    assert "output 0 differs" in next(iter(agreement.checks().values()))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda groups: pickle.loads(pickle.dumps(groups))], ids=["copied", "pickled"]
)
def test_the_overlay_s_choice_is_known_after_a_copy_and_a_user_s_is_never_taken_for_it(way, calls, adam):
    optimizer = make()
    adam.fuse(optimizer)
    steps(optimizer)
    (group,) = optimizer.param_groups
    group.update(way({name: value for name, value in group.items() if name != "params"}))
    assert optimizer.state_dict()["param_groups"][0]["fused"] is None
    for chosen in (True, 1):
        optimizer.param_groups[0]["fused"] = chosen
        assert optimizer.state_dict()["param_groups"][0]["fused"] is chosen
    adam.remove()
    assert optimizer.param_groups[0]["fused"] == 1, "as its user left it"


def test_groups_that_were_saved_can_be_loaded_without_the_overlay(calls, adam):
    optimizer = make()
    adam.fuse(optimizer)
    steps(optimizer)
    file = io.BytesIO()
    torch.save([{**group, "params": []} for group in optimizer.param_groups], file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)
    assert group["fused"] == 1, "torch takes that for True"


def test_a_chip_without_the_kernel_steps_natively(calls, adam, monkeypatch, agreement):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    expected = steps(make())
    optimizer = make()
    adam.fuse(optimizer)
    torch.testing.assert_close(steps(optimizer), expected, rtol=0, atol=0)
    assert not any(calls.values())
    assert optimizer.param_groups[0]["fused"] is None
    assert "torch has no aten::_fused_adamw_ for cpu" in agreement.checks()["adam in AdamW, float32"]


def test_parameters_on_the_cpu_step_natively(calls, adam, monkeypatch, agreement):
    monkeypatch.setattr(fused_check, "NATIVE_DEVICES", ("cpu",))
    optimizer = make()
    adam.fuse(optimizer)
    torch.testing.assert_close(steps(optimizer), steps(make()), rtol=0, atol=0)
    assert not any(calls.values())
    assert optimizer.param_groups[0]["fused"] is None
    assert agreement.checks() == {}


def test_adam_with_adamw_s_decay_is_compared_as_such(calls, adam, monkeypatch):
    pytest.importorskip("torch", minversion="2.7")
    asked = []
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: asked.append(name) or has(name, key)
    )
    options = {"kind": torch.optim.Adam, "decoupled_weight_decay": True}
    optimizer = make(**options)
    adam.fuse(optimizer)
    torch.testing.assert_close(steps(optimizer), steps(make(**options)), rtol=1e-6, atol=1e-6)
    assert calls == {"_fused_adam_": 0, "_fused_adamw_": 3 + 3}
    assert asked == ["aten::_fused_adamw_"]


def test_bf16_parameters_are_within_their_own_rounding(calls, adam, agreement):
    optimizer = make(dtype=torch.bfloat16)
    adam.fuse(optimizer)
    torch.testing.assert_close(steps(optimizer), steps(make(dtype=torch.bfloat16)), rtol=2e-2, atol=2e-2)
    assert agreement.checks() == {"adam in AdamW, bfloat16": "same"}


def test_an_optimizer_that_verl_has_dropped_is_not_kept(calls, adam):
    optimizer = make()
    adam.fuse(optimizer)
    steps(optimizer)
    dropped = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert dropped() is None


def test_an_engine_s_optimizer_alone_needs_no_triton(calls, monkeypatch):
    for file in ("rms_norm", "gate", "rotary"):
        monkeypatch.setitem(sys.modules, f"verl_fl_overlay.kernels.triton.{file}", None)  # its import raises
    optimizer = make()
    fused = Fused(Settings.of(fused=("adam",)))
    fused.start()
    try:
        events.engine_initialized.emit(events.Engine("fsdp", (torch.nn.Linear(2, 2),), optimizer))
        steps(optimizer)
        told = fused.describe()
        assert told["found"] == told["replaced"] == {"adam": 1}
        assert told["checks"] == {"adam in AdamW, float32": "same"}
        assert calls["_fused_adamw_"]
    finally:
        fused.stop()
    assert fused.describe()["replaced"] == {}
    before = dict(calls)
    steps(optimizer)
    assert calls == before
    assert optimizer.param_groups[0]["fused"] is None


def test_other_kinds_leave_the_optimizer_alone(calls):
    optimizer = make()
    fused = Fused(Settings.of(fused=("rms_norm",)))
    fused.start()
    try:
        events.engine_initialized.emit(events.Engine("fsdp", (torch.nn.Linear(2, 2),), optimizer))
        steps(optimizer)
    finally:
        fused.stop()
    assert not any(calls.values())


def each_from_the_other_s_checkpoint(folder, env):
    """Run verl's engines with the kernel and without, each from a checkpoint of the other; return what they told."""
    from arithmetic import write_model

    write_model(folder)
    told = result(
        Path(__file__).with_name("adam_engine.py"), folder, folder / "saved", env=env, start=warm, timeout=280
    )
    for strategy, runs in told.items():
        for name, one in runs.items():
            ours = name.startswith("fused")
            assert one["replaced"] == ({"adam": 1} if ours else {}), (strategy, name)
            assert one["calls"] >= 2 if ours else one["calls"] == 0, (strategy, name)
            for found, expected in zip(one["steps"], runs["native"]["steps"], strict=True):
                assert found == pytest.approx(expected, rel=1e-3), (strategy, name)
    return told


def test_verl_s_checkpoints_go_on_with_and_without(tmp_path):
    pytest.importorskip("verl")
    assert set(each_from_the_other_s_checkpoint(tmp_path, OVERLAY)) == {"fsdp2"}
