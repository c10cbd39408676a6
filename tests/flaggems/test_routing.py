"""Routed inside the phase, native outside, gradients equal: the stand-ins on the CPU's key, in torch's dispatcher."""

from __future__ import annotations

import gc
import logging
import os
import threading

import pytest

torch = pytest.importorskip("torch")

from verl_fl_overlay import phase  # noqa: E402
from verl_fl_overlay.errors import SettingsError  # noqa: E402
from verl_fl_overlay.features.flaggems import Routing  # noqa: E402
from verl_fl_overlay.flaggems import safety  # noqa: E402
from verl_fl_overlay.flaggems.dispatcher import registered_in  # noqa: E402
from verl_fl_overlay.flaggems.library import Kernel  # noqa: E402
from verl_fl_overlay.flaggems.routing import Router  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402


@pytest.fixture
def routing(on_cpu):
    """Start the feature as activation does; end it with the test."""
    features = []

    def start(**settings):
        features.append(Routing(Settings.of(**settings)))
        features[-1].start()
        return on_cpu

    start.describe = lambda: features[-1].describe()
    yield start
    for feature in features:
        feature.stop()


def held_natively(kernels) -> bool:
    return all(not registered_in(k.key, "CPU").endswith("routing.py") for k in kernels)


def gradients(function, *shapes, seed=0):
    """Return what ``function`` gives and its gradients for inputs of ``shapes``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(shape, generator=generator).add_(0.5).requires_grad_() for shape in shapes]
    result = function(*inputs)
    if result.requires_grad:
        result.square().sum().backward()
    return result.detach(), [tensor.grad for tensor in inputs]


def test_kernels_are_called_inside_the_phase_only(routing):
    stand_ins = routing(ops=("mul", "mm"))
    a = torch.rand(3, 3)
    product = a * a
    assert not stand_ins.calls
    with phase.training.inside("train"):
        assert torch.equal(a * a, product)
        squared = a @ a
        with phase.training.inside("train_batch"):  # verl nests them
            a * a
        a * a  # still in the outer one
    torch.testing.assert_close(squared, a @ a)
    assert stand_ins.calls == {"mul": 3, "mm": 1}
    a * a
    a @ a
    assert stand_ins.calls == {"mul": 3, "mm": 1}


def test_they_are_called_in_autograds_own_threads_too(routing):
    stand_ins = routing(ops=("mm",))
    a = torch.rand(3, 3, requires_grad=True)
    with phase.training.inside("train"):
        loss = (a @ a).sum()
        assert stand_ins.calls["mm"] == 1
        done = threading.Thread(target=loss.backward)
        done.start()
        done.join()
    assert stand_ins.calls["mm"] == 3


def test_native_again_when_a_step_raises(routing):
    stand_ins = routing(ops=("mul",))
    with pytest.raises(ZeroDivisionError), phase.training.inside("train"):
        raise ZeroDivisionError
    torch.rand(2) * torch.rand(2)
    assert not stand_ins.calls
    assert held_natively(stand_ins.KERNELS)


def test_the_whole_process_from_the_first_engine_on_if_asked_for(routing):
    stand_ins = routing(ops=("mul",), scope="process")
    torch.rand(2) * torch.rand(2)
    assert not stand_ins.calls
    with phase.training.inside("initialize"):
        pass
    torch.rand(2) * torch.rand(2)
    assert stand_ins.calls == {"mul": 1}
    assert "process" in routing.describe()["scope"]


def test_stopping_takes_everything_back(on_cpu):
    feature = Routing(Settings.of(ops=("mul",), scope="process"))
    feature.start()
    with phase.training.inside("initialize"):
        pass
    assert not held_natively(on_cpu.KERNELS)
    feature.stop()
    assert held_natively(on_cpu.KERNELS)
    with phase.training.inside("train"):
        torch.rand(2) * torch.rand(2)
    assert not on_cpu.calls


KINDS = {
    "a derivative formula": ("mul", lambda a, b: a * b, [(4, 8), (4, 8)]),
    "a derivative formula, backward through kernels": ("mm", lambda a, b: a @ b, [(4, 8), (8, 3)]),
    "a formula, for one of a function's keys": ("true_divide", lambda a, b: torch.div(a, b), [(4, 8), (4, 8)]),
    "an autograd.Function": ("rms_norm", lambda x, w: torch.rms_norm(x, [8], w, 1e-5), [(2, 4, 8), (8,)]),
    "calls of torch": ("hstack", lambda a, b: torch.hstack([a, b]), [(4, 8), (4, 3)]),
    "where.self": ("where_self", lambda a, b: torch.where(a > b, a, b), [(4, 8), (4, 8)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_gradients_are_the_native_ones(routing, kind):
    name, function, shapes = KINDS[kind]
    expected, expected_gradients = gradients(function, *shapes)
    stand_ins = routing(ops=(name,))
    with phase.training.inside("train"):
        found, found_gradients = gradients(function, *shapes)
    assert stand_ins.calls[name] > 0
    torch.testing.assert_close(found, expected)
    assert all(gradient is not None for gradient in found_gradients)
    torch.testing.assert_close(found_gradients, expected_gradients)


CUT = {
    # https://github.com/flagos-ai/FlagGems/issues/1971: grad_norm 0 in verl, from where with a number
    "where.ScalarOther": ("where_scalar_other", lambda a: torch.where(a > 0.9, a, 0.25), [(4, 8)]),
    "true_divide.Tensor": ("true_divide", lambda a, b: torch.true_divide(a, b), [(4, 8), (4, 8)]),
}


@pytest.mark.parametrize("key", CUT)
def test_a_kernel_that_would_cut_the_gradient_is_left_out_and_does_cut_it_when_let_through(routing, key):
    _, function, shapes = CUT[key]
    expected, expected_gradients = gradients(function, *shapes)
    routing()
    with phase.training.inside("train"):
        found, found_gradients = gradients(function, *shapes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradients, expected_gradients)
    assert "gradient would be cut" in routing.describe()["left out"][key]


@pytest.mark.parametrize("key", CUT)
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_one_let_through_by_name_is_routed_and_shows_why_it_was_left_out(routing, key):
    name, function, shapes = CUT[key]
    stand_ins = routing(unsafe_ops=(key,))
    with phase.training.inside("train"):
        _, found_gradients = gradients(function, *shapes)
    assert stand_ins.calls[name] == 1
    assert all(gradient is None for gradient in found_gradients)


def test_a_whitelist_of_unsafe_operators_only_leaves_nothing_and_says_why(routing):
    routing(flagos_whitelist=("where_scalar_other",))
    with pytest.raises(SettingsError) as error, phase.training.inside("initialize"):
        pass
    assert "TRAINING_FL_FLAGOS_WHITELIST leaves no operator" in str(error.value)
    assert "where.ScalarOther: torch differentiates" in str(error.value)
    assert not phase.training.active


def test_a_wrong_name_stops_training_also_when_not_strict(routing):
    routing(flagos_whitelist=("mul", "rmsnorm"))
    for _ in range(2):
        with pytest.raises(SettingsError, match="FlagGems calls it rms_norm"), phase.training.inside("initialize"):
            pass
    assert "rmsnorm" in routing.describe()["state"]


def test_a_wrong_unsafe_key_is_told_with_the_keys_of_the_function(routing):
    routing(unsafe_ops=("true_divide",))
    with pytest.raises(SettingsError, match=r"its aten keys are div\.Tensor, true_divide\.Tensor"):
        phase.training.enter("initialize")
    phase.training.leave()


def test_a_blacklist_routes_the_rest(routing):
    routing(flagos_blacklist=("mul", "mm", "where_self"))
    with phase.training.inside("train"):
        pass
    described = routing.describe()
    assert described["routed"] == ["div.Tensor", "rms_norm", "hstack"]
    assert described["source"] == "TRAINING_FL_FLAGOS_BLACKLIST"


@pytest.mark.parametrize("override", [True, False])
def test_what_somebody_else_registered_is_left_to_them(routing, caplog, monkeypatch, override):
    """torch <= 2.11 raises on a second Python kernel for one key, newer ones override it without a word."""
    monkeypatch.setitem(torch.library.Library.impl.__kwdefaults__, "allow_override", override)
    theirs = torch.library.Library("aten", "IMPL")
    seen = []
    theirs.impl("mul.Tensor", lambda a, b: seen.append("theirs") or torch.add(a, b), "CPU")
    try:
        stand_ins = routing(ops=("mul", "mm"))
        a = torch.rand(2, 2)
        with phase.training.inside("train"):
            assert torch.equal(a * a, a + a)
            a @ a
        assert torch.equal(a * a, a + a)
        assert seen == ["theirs", "theirs"]
        assert stand_ins.calls == {"mm": 1}
        described = routing.describe()
        assert described["held by others"] == {"mul.Tensor": __file__}
        assert described["routed"] == ["mm"]
        assert "held by" in caplog.text
        assert "aten/mul.Tensor/CPU" in torch.library._impls
    finally:
        theirs._destroy()
    with phase.training.inside("train"):
        a * a
    assert stand_ins.calls["mul"] == 1
    assert not routing.describe()["held by others"]


def test_what_torch_itself_registers_from_python_is_overridden_and_comes_back(on_cpu):
    """torch 2.12 has a Python kernel for bmm of its own."""
    inside_torch = os.path.join(os.path.dirname(torch.__file__), "_native", "ops.py")
    scope = {"torch": torch}
    exec(compile('library = torch.library.Library("aten", "IMPL")', inside_torch, "exec"), scope)
    scope["library"].impl("mm", lambda a, b: torch.zeros(2, 2), "CPU")
    try:
        router = Router([k for k in on_cpu.KERNELS if k.key == "mm"])
        a = torch.ones(2, 2)
        router.enter()
        assert (a @ a).sum() == 8
        router.leave()
        assert not router.held
        assert (a @ a).sum() == 0
        assert "aten/mm/CPU" in torch.library._impls
    finally:
        scope["library"]._destroy()


def test_one_that_cannot_be_registered_is_named_and_the_others_stay(monkeypatch, routing, caplog):
    original = torch.library.Library.impl

    def impl(self, key, *args, **kwargs):
        if key == "mul.Tensor":
            raise RuntimeError("no such schema")
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", impl)
    stand_ins = routing(ops=("mul", "mm"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with phase.training.inside("train"):
                torch.rand(2, 2) * torch.rand(2, 2)
                torch.rand(2, 2) @ torch.rand(2, 2)
    assert stand_ins.calls == {"mm": 2}
    assert routing.describe()["failed"] == {"mul.Tensor": "RuntimeError: no such schema"}
    assert caplog.text.count("mul.Tensor") == 1


def test_ten_thousand_cycles_leave_nothing_behind(on_cpu):
    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    router = Router([k for k in on_cpu.KERNELS if not safety.why_unsafe(k)])
    before = {k.key: torch._C._dispatch_dump(f"aten::{k.key}") for k in router.kernels}
    claims = set(torch.library._impls)

    def cycle(times: int) -> None:
        for _ in range(times):
            router.enter()
            router.leave()

    cycle(2_000)
    start = resident()
    cycle(10_000)
    grown = resident() - start
    assert grown < 2 << 20, f"{grown} bytes"  # torch keeps the name of routing.py for each Library: 100 bytes
    assert set(torch.library._impls) == claims
    assert {k.key: torch._C._dispatch_dump(f"aten::{k.key}") for k in router.kernels} == before


def test_an_extra_autograd_key_needs_a_function_that_autograd_sees(on_cpu):
    """Newer FlagGems put some operators on the Autograd key as well."""
    assert safety.why_unsafe(Kernel("mul.Tensor", on_cpu.mul, ("CPU", "Autograd")))
    assert not safety.why_unsafe(Kernel("rms_norm", on_cpu.rms_norm, ("CPU", "Autograd")))
    assert not safety.why_unsafe(Kernel("mul.Tensor", on_cpu.mul, ("CPU",)))


def detached(tensors):
    return torch.cat([tensor.detach() for tensor in tensors], dim=1)


def without_gradient(tensors):
    with torch.no_grad():
        return torch.cat(tensors, dim=1)


def imported_late(tensors):
    from stand_ins import multiply

    return torch.cat([multiply(tensor, 1) for tensor in tensors], dim=1)


@pytest.mark.parametrize(
    ("function", "said"),
    [(detached, "uses detach"), (without_gradient, "uses no_grad"), (imported_late, "imports stand_ins when")],
)
def test_calls_of_torch_that_autograd_does_not_see_are_found_in_the_code(on_cpu, function, said):
    tensor = torch.ones(2, 3, requires_grad=True)
    assert not function([tensor]).requires_grad
    assert said in safety.why_unsafe(Kernel("hstack", function, ("CPU",)))
    assert not safety.why_unsafe(Kernel("hstack", on_cpu.hstack, ("CPU",)))


def test_the_record_counts_what_was_called_and_is_this_ranks_own(routing, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    logger = logging.getLogger("flag_gems")
    before = (logger.level, logger.propagate, list(logger.handlers))
    routing(ops=("mul", "mm"), record=str(tmp_path / "deep" / "ops.txt"))
    a = torch.rand(2, 2)
    with phase.training.inside("train"):
        a * a
        a * a
        a @ a
    a * a
    (file,) = (tmp_path / "deep").iterdir()
    assert file.name.startswith("ops.training.rank5.")
    assert file.name.endswith(f"-{os.getpid()}.txt")
    assert [line.split() for line in file.read_text().splitlines()[1:]] == [
        ["2", "aten::mul.Tensor", "stand_ins.mul"],
        ["1", "aten::mm", "stand_ins.mm"],
    ]
    assert routing.describe()["record"] == str(file)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_record_that_cannot_be_written_is_warned_about_once(routing, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    routing(ops=("mul",), record=str(tmp_path / "file" / "ops.txt"))
    for _ in range(2):
        with phase.training.inside("train"):
            torch.rand(2) * torch.rand(2)
    assert caplog.text.count("TRAINING_FLAGGEMS_PATH") == 1


def test_one_that_cannot_be_registered_for_autograd_is_not_left_to_cut_the_gradient():
    router = Router([Kernel("where.ScalarOther", lambda condition, a, b: a.detach(), ("CPU", "AutogradNothing"))])
    a = torch.ones(2, requires_grad=True)
    router.enter()
    try:
        torch.where(a > 0, a, 0.5).sum().backward()
    finally:
        router.leave()
    assert list(router.failed) == ["where.ScalarOther"]
    assert a.grad is not None
