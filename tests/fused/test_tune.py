"""Tuning on a CPU, with stand-in kernels: a step is recorded, what is faster is chosen, a break is gone on from."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

from verl_fl_overlay.flaggems import calls, plot, timing, tune  # noqa: E402
from verl_fl_overlay.flaggems.library import FlagGems, Kernel  # noqa: E402
from verl_fl_overlay.flaggems.profile import Key, Profile, ProfileError, load  # noqa: E402

KEY = Key("a CPU", "x", "x", "x")


def make_step():
    """Return a step of a product, a scaling and a sum, with its backward."""
    weight = torch.randn(64, 32, requires_grad=True)

    def step():
        (torch.mm(torch.ones(8, 64), weight) * 2.0).exp().sum().backward()
        weight.grad = None

    return step


def product(x, y):
    return torch.from_numpy(x.detach().numpy() @ y.detach().numpy())


def exponential(x):
    return torch.from_numpy(numpy.exp(x.detach().numpy()))


def gems(**functions):
    keys = {"mm": "mm", "exp": "exp", "mul": "mul.Tensor"}
    return FlagGems("x", "x", tuple(Kernel(keys[name], f, ("CPU",)) for name, f in functions.items()))


def named(name, function):
    """Return a kernel of that name, which must not call the operator that it stands for."""

    def kernel(*args, **kwargs):
        return function(*args, **kwargs)

    kernel.__name__ = name
    return kernel


def test_a_step_is_recorded_with_its_backward():
    found = calls.record(make_step(), gems(mm=named("mm", product), mul=named("mul", None)).kernels)
    assert found["mm"].total() == 2  # the product, and the gradient of the weight
    shapes = {tuple(leaf.size for leaf in call.leaves if isinstance(leaf, calls.Like)) for call in found["mm"]}
    assert shapes == {((8, 64), (64, 32)), ((64, 8), (8, 32))}
    assert found["mul.Tensor"].total() >= 2


def test_a_slow_kernel_is_not_chosen_and_whole_steps_are_timed(tmp_path):
    def slow(x, y):
        time.sleep(0.05)
        return product(x, y)

    file = tmp_path / "p.json"
    made = tune.tune(make_step(), gems(mm=named("mm", slow)), KEY, "w", file, say=lambda line: None)
    (one,) = made.measurements
    assert one.flaggems_ms > one.native_ms
    assert one.calls == 2
    assert made.chosen == ()
    assert set(made.step_ms) == {"native"}
    assert load(file) == made


def test_each_call_counts_with_the_time_of_its_own_size(monkeypatch):
    """Three large calls and many small ones, of which not all sizes are timed: the large ones say nothing of them."""
    sizes = [3000, 2999, 2998, *[1] * 50, *[2] * 40, *[3] * 30, *[4] * 20]

    def step():
        for size in sizes:
            torch.zeros(size).exp()

    monkeypatch.setattr(tune, "call_ms", lambda run: float(run().numel()))
    (kernel,) = gems(exp=named("exp", lambda x: torch.zeros(2 * x.numel()))).kernels
    one = tune.measure(kernel, calls.record(step, [kernel])["exp"])
    assert one.calls == 143
    assert one.native_ms == pytest.approx(sum(sizes), rel=0.01)
    assert one.flaggems_ms == pytest.approx(2 * sum(sizes), rel=0.01)


def test_both_sides_are_timed_through_the_dispatcher():
    within = []

    def kernel(x):
        within.append("aten/exp/CPU" in torch.library._impls)
        return exponential(x)

    kernels = gems(exp=named("exp", kernel)).kernels
    (found,) = calls.record(make_step(), kernels).values()
    assert not tune.measure(kernels[0], found).note
    assert set(within) == {True}
    assert "aten/exp/CPU" not in torch.library._impls


def test_an_operator_that_another_holds_is_not_timed_for_it():
    kernels = gems(exp=named("exp", exponential)).kernels
    (found,) = calls.record(make_step(), kernels).values()
    another = torch.library.Library("aten", "IMPL")
    try:
        another.impl("exp", exponential, "CPU")
        one = tune.measure(kernels[0], found)
    finally:
        another._destroy()
    assert one.note.startswith("held by ")
    assert (one.native_ms, one.flaggems_ms) == (0.0, 0.0)


class Steps:
    """Stands for ``step_ms``: gives each whole step a time by the kernels that answer it."""

    def __init__(self, monkeypatch, routed):
        self.turns = []
        self._routed = routed
        monkeypatch.setattr(tune, "step_ms", self)

    def __call__(self, step):
        names = {name for name in ("mm", "exp") if f"aten/{name}/CPU" in torch.library._impls}
        self.turns.append(names)
        return self._routed(names, len(self.turns)) if names else 10.0


def tuned(tmp_path, **kernels):
    lines = []
    made = tune.tune(make_step(), gems(**kernels), KEY, "w", tmp_path / "p", say=lines.append)
    return made, lines


@pytest.fixture
def every_kernel_wins(monkeypatch):
    """Make FlagGems' side of each operator the faster one, ``exp`` by more than ``mm``."""
    times = {("mm", False): 1.0, ("mm", True): 0.9, ("exp", False): 1.0, ("exp", True): 0.1}

    def spent(key, counted):
        return times[key, f"aten/{key}/CPU" in torch.library._impls]

    monkeypatch.setattr(tune, "_spent", spent)


def test_what_is_faster_is_routed_and_kept_if_whole_steps_agree(tmp_path, monkeypatch, every_kernel_wins):
    steps = Steps(monkeypatch, lambda names, turn: 8.0)
    made, lines = tuned(tmp_path, mm=named("mm", product), exp=named("exp", exponential))
    assert made.chosen == ("exp", "mm")
    assert made.step_ms == {"native": 10.0, "chosen": 8.0}
    assert steps.turns == [set(), {"mm", "exp"}] * tune.ROUNDS
    assert lines[-1].startswith("whole step with exp, mm: native 10.0, routed 8.0 ms, faster in 5 of 5 rounds")


def test_one_lost_round_is_enough_and_the_better_half_is_tried(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda names, turn: 8.0 if "mm" not in names or turn != 4 else 10.5)
    made, _ = tuned(tmp_path, mm=named("mm", product), exp=named("exp", exponential))
    assert made.chosen == ("exp",)
    assert made.step_ms == {"native": 10.0, "chosen": 8.0}


def test_whole_steps_have_the_last_word(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda names, turn: 10.0)
    made, lines = tuned(tmp_path, mm=named("mm", product), exp=named("exp", exponential))
    assert made.chosen == ()
    assert made.step_ms == {"native": 10.0}
    assert lines[-1] == "nothing is routed; whole step: 10.0 ms"


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    file = tmp_path / "p.json"
    both = gems(mm=named("mm", product), exp=named("exp", exponential))
    lines = []

    def interrupt(line):
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(make_step(), both, KEY, "w", file, say=interrupt)
    assert len(load(file).measurements) == 1
    tune.tune(make_step(), both, KEY, "w", file, say=lambda line: None)
    measured = load(file).measurements
    assert {one.key for one in measured} == {"mm", "exp"}
    assert len(lines) == 1
    monkeypatch.setattr(tune, "measure", lambda *rest: pytest.fail("measured again"))
    assert tune.tune(make_step(), both, KEY, "w", file, say=lambda line: None).measurements == measured


def test_a_profile_of_another_workload_is_not_overwritten(tmp_path):
    file = tmp_path / "p.json"
    Profile(KEY, "another", chosen=("mm",)).save(file)
    before = file.read_text()
    with pytest.raises(ProfileError, match=r"not overwritten(.|\n)*another\n(.|\n)*; w"):
        tune.tune(make_step(), gems(mm=named("mm", product)), KEY, "w", file, say=lambda line: None)
    assert file.read_text() == before


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(ProfileError, match="cannot be written"):
        tune.tune(None, gems(), KEY, "w", tmp_path / "nowhere" / "p.json")


def test_what_was_skipped_is_measured_when_it_is_not_skipped_any_more(tmp_path):
    file, kernels = tmp_path / "p.json", gems(mm=named("mm", product))
    (one,) = tune.tune(make_step(), kernels, KEY, "w", file, skip=["mm"], say=lambda line: None).measurements
    assert one.note == "not measured: skipped"
    (one,) = tune.tune(make_step(), kernels, KEY, "w", file, say=lambda line: None).measurements
    assert one.native_ms > 0
    assert not one.note


def test_a_kernel_that_fails_is_noted(tmp_path):
    def broken(x, y):
        raise RuntimeError("no such shape")

    made = tune.tune(make_step(), gems(mm=named("mm", broken)), KEY, "w", tmp_path / "p", say=lambda line: None)
    assert made.measurements[0].note == "RuntimeError: no such shape"
    assert made.chosen == ()


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    made = tune.tune(make_step(), gems(mm=named("mm", product)), KEY, "w", tmp_path / "p", say=lambda line: None)
    plot.plot(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "like",
    [
        torch.randn(3, 1).expand(3, 5),
        torch.randn(4, 6).t(),
        torch.tensor([[5], [7]]).expand(2, 4),
        torch.arange(12).reshape(3, 4).t(),
        torch.tensor([True, False]),
        torch.tensor(3),
    ],
    ids=["expanded", "transposed", "expanded indices", "transposed indices", "mask", "scalar"],
)
def test_a_tensor_is_made_again_as_it_lies_in_memory(like):
    made = calls.Like.of(like).make()
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
    if not like.dtype.is_floating_point:
        assert made.equal(like)


def test_indices_are_those_of_the_step_and_calls_are_told_apart_by_shape():
    table = torch.randn(10, 2)

    def step():
        for indices in ([3, 3, 9], [1, 2, 3], [4]):
            torch.embedding(table, torch.tensor(indices))

    found = calls.record(step, [Kernel("embedding", named("embedding", None), ("CPU",))])["embedding"]
    assert sorted(found.values()) == [1, 2]
    (repeated,) = (call for call, count in found.items() if count == 2)
    (_, indices, *_), _ = repeated.arguments()
    assert indices.tolist() == [3, 3, 9]


def test_a_call_on_the_cpu_is_not_the_accelerator_s():
    kernel = Kernel("mm", named("mm", product), ("CUDA",))
    assert calls.record(make_step(), [kernel]) == {}


class Chip:
    """A torch device module whose clock runs on while nobody waits, as a queue of kernels does."""

    waited = 0

    def is_available(self):
        return True

    def synchronize(self):
        self.waited += 1
        time.sleep(0.02)

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            self.at += 0.5

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)


def test_any_accelerator_is_waited_for(monkeypatch):
    chip = Chip()
    monkeypatch.setattr(torch, "get_device_module", lambda: chip)
    assert timing.call_ms(lambda: None) >= 500
    assert timing.step_ms(lambda: None) >= 20
    assert chip.waited == 4


def test_the_host_s_time_counts_where_there_is_no_accelerator_or_it_is_longer(monkeypatch):
    assert timing.accelerator() is None or torch.get_device_module().is_available()
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cpu)
    assert 5 <= timing.call_ms(lambda: time.sleep(0.005), repeats=3) < 50
