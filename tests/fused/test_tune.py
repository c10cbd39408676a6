"""Tuning on a CPU, with stand-in kernels: a step is recorded, what is faster is chosen, a break is gone on from."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

from verl_fl_overlay.flaggems import safety  # noqa: E402
from verl_fl_overlay.flaggems.library import FlagGems, Kernel  # noqa: E402
from verl_fl_overlay.flaggems.profile import Key, Profile, ProfileError, load  # noqa: E402
from verl_fl_overlay.flaggems.tuning import calls, contest, plot, timing, tune  # noqa: E402

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
    found = calls.calls_of(make_step(), gems(mm=named("mm", product), mul=named("mul", None)).kernels)
    assert found["mm"].total() == 2  # the product, and the gradient of the weight
    shapes = {tuple(leaf.size for leaf in call.leaves if isinstance(leaf, calls.Like)) for call in found["mm"]}
    assert shapes == {((8, 64), (64, 32)), ((64, 8), (8, 32))}
    assert found["mul.Tensor"].total() >= 2


def test_a_slow_kernel_is_not_chosen_and_whole_steps_are_timed(tmp_path):
    def slow(x, y):
        time.sleep(0.03)
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
    one = tune.measure(kernel, calls.calls_of(step, [kernel])["exp"])
    assert one.calls == 143
    assert one.native_ms == pytest.approx(sum(sizes), rel=0.01)
    assert one.flaggems_ms == pytest.approx(2 * sum(sizes), rel=0.01)


def test_both_sides_are_timed_through_the_dispatcher():
    within = []

    def kernel(x):
        within.append("aten/exp/CPU" in torch.library._impls)
        return exponential(x)

    kernels = gems(exp=named("exp", kernel)).kernels
    (found,) = calls.calls_of(make_step(), kernels).values()
    assert not tune.measure(kernels[0], found).note
    assert set(within) == {True}
    assert "aten/exp/CPU" not in torch.library._impls


def test_an_operator_that_another_holds_is_left_to_it():
    another = torch.library.Library("aten", "IMPL")
    try:
        another.impl("exp", exponential, "CPU")
        assert set(calls.calls_of(make_step(), gems(exp=named("exp", None), mm=named("mm", None)).kernels)) == {"mm"}
    finally:
        another._destroy()


class Steps:
    """Stands for ``timing.step_ms``: gives each whole step a time by the kernels that answer it."""

    def __init__(self, monkeypatch, routed):
        self.turns = []
        self._routed = routed
        monkeypatch.setattr(timing, "step_ms", self)

    def __call__(self, step):
        found = {name for name in ("mm", "exp", "mul.Tensor") if f"aten/{name}/CPU" in torch.library._impls}
        self.turns.append(found)
        return self._routed(found, len(self.turns)) if found else 10.0


def tuned(tmp_path, **kernels):
    lines = []
    made = tune.tune(make_step(), gems(**kernels), KEY, "w", tmp_path / "p", say=lines.append)
    return made, lines


THREE = {name: named(name, None) for name in ("mm", "exp", "mul")}


@pytest.fixture
def every_kernel_wins(monkeypatch):
    """Make FlagGems' side of each operator the faster one: of ``exp`` most, of ``mm`` least."""
    ours = {"mm": 0.9, "exp": 0.1, "mul.Tensor": 0.5}

    def spent(key, counted):
        return ours[key] if f"aten/{key}/CPU" in torch.library._impls else 1.0

    monkeypatch.setattr(tune, "_spent", spent)


def test_what_is_faster_is_routed_and_kept_if_whole_steps_agree(tmp_path, monkeypatch, every_kernel_wins):
    steps = Steps(monkeypatch, lambda found, turn: 8.0)
    made, lines = tuned(tmp_path, **THREE)
    assert made.chosen == ("exp", "mm", "mul")
    assert made.step_ms == {"native": 10.0, "chosen": 8.0}
    assert steps.turns == [set(), {"mm", "exp", "mul.Tensor"}] * 2 * contest.ROUNDS
    assert lines[-1] == "whole step, native: 10.0 ms; with exp, mul, mm: 8.0 ms"


@pytest.mark.parametrize("bad", ["mm", "exp", "mul.Tensor"])
def test_one_bad_operator_keeps_no_other_out(tmp_path, monkeypatch, every_kernel_wins, bad):
    Steps(monkeypatch, lambda found, turn: 10.0 - len(found) + 5 * (bad in found))
    made, _ = tuned(tmp_path, **THREE)
    assert set(made.chosen) == {"mm", "exp", "mul"} - {bad.partition(".")[0]}
    assert made.step_ms == {"native": 10.0, "chosen": 8.0}


def test_one_lost_round_is_enough(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda found, turn: 10.5 if turn == 2 * contest.ROUNDS and len(found) == 3 else 9.0)
    made, lines = tuned(tmp_path, **THREE)
    assert "round 5 is lost, 10.5 ms against 10.0" in "".join(lines)
    assert made.chosen == ("exp",)  # the others add nothing to it


def test_whole_steps_have_the_last_word(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda found, turn: 10.0)
    made, lines = tuned(tmp_path, **THREE)
    assert made.chosen == ()
    assert made.step_ms == {"native": 10.0}
    assert lines[-1] == "nothing is routed: nothing made whole steps faster"


def test_what_was_chosen_is_confirmed(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda found, turn: 8.0 if turn <= 2 * contest.ROUNDS else 12.0)
    made, _ = tuned(tmp_path, **THREE)
    assert made.chosen == ()


def test_a_kernel_that_fails_in_a_whole_step_loses_and_the_others_go_on(tmp_path, monkeypatch, every_kernel_wins):
    def step_fails(found, turn):
        if "exp" in found:
            raise RuntimeError("no such shape")
        return 9.0

    Steps(monkeypatch, step_fails)
    made, lines = tuned(tmp_path, **THREE)
    assert made.chosen == ("mm", "mul")
    assert "whole step with exp, mul, mm: RuntimeError: no such shape" in lines


def test_a_native_step_that_fails_is_an_error(tmp_path, monkeypatch):
    def fails(step):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timing, "step_ms", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned(tmp_path, mm=named("mm", product))


def test_a_function_is_tried_only_if_all_of_its_operators_are_faster_and_safe(tmp_path, monkeypatch):
    """Of "both" one operator is slower, of "cut" one is unsafe: the other one of "cut" would have to be left out."""
    kernels = tuple(
        Kernel(key, named(name, None), ("CPU",))
        for key, name in [("mm", "both"), ("exp", "both"), ("mul.Tensor", "cut"), ("sum", "cut"), ("ones_like", "good")]
    )
    ours = {"mm": 0.5, "exp": 2.0, "mul.Tensor": 0.5, "sum": 0.5, "ones_like": 0.5}
    monkeypatch.setattr(
        tune, "_spent", lambda key, counted: ours[key] if f"aten/{key}/CPU" in torch.library._impls else 1.0
    )
    monkeypatch.setattr(safety, "why_unsafe", lambda kernel: "its gradient is cut" if kernel.key == "sum" else "")
    tried = []
    monkeypatch.setattr(
        timing, "step_ms", lambda step: tried.append({k for k in ours if f"aten/{k}/CPU" in torch.library._impls}) or 1
    )
    made = tune.tune(make_step(), FlagGems("x", "x", kernels), KEY, "w", tmp_path / "p", say=lambda line: None)
    assert {one.key: one.note for one in made.measurements if one.note} == {"sum": "its gradient is cut"}
    assert {frozenset(found) for found in tried} == {frozenset(), frozenset({"ones_like"})}


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_a_step_with_a_routed_kernel_keeps_a_gradient_that_torch_would_have_decomposed():
    x = torch.randn(2, 8, requires_grad=True)
    triple = Kernel("rms_norm", named("rms_norm", lambda x, *rest: 3 * x), ("CPU",))
    with contest.routed([triple]):
        torch.nn.functional.rms_norm(x, (8,)).sum().backward()
    assert set(x.grad.flatten().tolist()) == {3.0}


def test_unsafe_kernels_of_a_function_are_never_routed(monkeypatch):
    seen = []
    monkeypatch.setattr(safety, "why_unsafe", lambda kernel: "unsafe" if kernel.key == "exp" else "")
    kernels = (Kernel("mm", named("f", product), ("CPU",)), Kernel("exp", named("f", exponential), ("CPU",)))
    monkeypatch.setattr(timing, "step_ms", lambda step: seen.extend(torch.library._impls))
    contest.Contest(make_step(), FlagGems("x", "x", kernels), print).step_ms(["f"])
    assert "aten/mm/CPU" in seen
    assert "aten/exp/CPU" not in seen


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


def test_what_was_chosen_stays_until_something_else_is(tmp_path, monkeypatch, every_kernel_wins):
    """A tuning that breaks off must not leave a profile that says: route nothing."""
    Steps(monkeypatch, lambda found, turn: 8.0)
    made, _ = tuned(tmp_path, **THREE)

    def breaks():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tune.tune(breaks, gems(**THREE), KEY, "w", tmp_path / "p")
    assert load(tmp_path / "p") == made


def test_what_was_chosen_for_another_step_does_not_stay(tmp_path, monkeypatch, every_kernel_wins):
    Steps(monkeypatch, lambda found, turn: 8.0)
    tuned(tmp_path, **THREE)

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(lambda: torch.ones(3).exp().exp(), gems(**THREE), KEY, "w", tmp_path / "p", say=interrupt)
    left = load(tmp_path / "p")
    assert ([one.key for one in left.measurements], left.chosen, left.step_ms) == (["exp"], (), {})


def test_what_was_measured_of_another_step_is_measured_again(tmp_path):
    file, both = tmp_path / "p", gems(mm=named("mm", product), exp=named("exp", exponential))

    def twice():
        make_step()()
        torch.zeros(3).exp()

    (one,) = tune.tune(lambda: torch.ones(2, 2) @ torch.ones(2, 2), both, KEY, "w", file, say=print).measurements
    again = {one.key: one for one in tune.tune(twice, both, KEY, "w", file, say=print).measurements}
    assert (one.key, one.calls) == ("mm", 1)
    assert (again["mm"].calls, again["exp"].calls) == (2, 2)


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
    if like.dtype.is_floating_point:
        assert 0 < made.abs().max() < 1
    else:
        assert made.equal(like)


def test_indices_are_those_of_the_step_and_calls_are_told_apart_by_shape():
    table = torch.randn(10, 2)

    def step():
        for indices in ([3, 3, 9], [1, 2, 3], [4]):
            torch.embedding(table, torch.tensor(indices))

    kernels = [Kernel(key, named(key, None), ("CPU",)) for key in ("embedding", "as_strided")]
    recorded = calls.calls_of(step, kernels)
    found = recorded["embedding"]
    assert sorted(found.values()) == [1, 2]
    (repeated,) = (call for call, count in found.items() if count == 2)
    (_, indices, *_), _ = repeated.arguments()
    assert indices.tolist() == [3, 3, 9]
    described = [call.leaves[0].dtype for call in recorded.get("as_strided", ())]
    assert torch.int64 not in described  # what describing the indices calls is no call of the step's


def test_what_an_operator_calls_itself_is_recorded_too_and_computed_by_torch():
    keys = ("ones", "fill_.Scalar", "_to_copy", "copy_")
    kernels = [Kernel(key, named("any", None), ("CPU",)) for key in keys]
    made = []
    found = calls.calls_of(lambda: made.append(torch.ones(3).to(torch.float64)), kernels)
    assert made[0].tolist() == [1, 1, 1]
    assert {key: found[key].total() for key in keys} == dict.fromkeys(keys, 1)
    assert not any(f"aten/{key}/CPU" in torch.library._impls for key in keys)


def test_a_recorded_step_is_the_real_one():
    """Two uses of a weight: autograd adds the second gradient in place, which it does not under a dispatch mode."""
    weight = torch.randn(4, 4, requires_grad=True)

    def step():
        for _ in range(2):
            (weight * weight.exp()).sum().backward()

    kernels = [Kernel(key, named("any", None), ("CPU",)) for key in ("add_.Tensor", "add.Tensor")]
    found = calls.calls_of(step, kernels)
    recorded, weight.grad = weight.grad, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    assert torch.equal(recorded, weight.grad)
    real = {event.key: event.count for event in profiler.key_averages()}
    assert found["add_.Tensor"].total() == real["aten::add_"] > 0
    assert ("add.Tensor" in found) == ("aten::add" in real)


@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_an_operator_that_torch_decomposes_keeps_its_gradient_while_it_is_recorded():
    x = torch.randn(2, 8, requires_grad=True)
    found = calls.calls_of(
        lambda: torch.nn.functional.rms_norm(x, (8,)).sum().backward(),
        [Kernel("rms_norm", named("rms_norm", None), ("CPU",))],
    )
    assert found["rms_norm"].total() == 1
    assert x.grad.abs().sum() > 0


def test_a_call_on_the_cpu_is_not_the_accelerator_s():
    kernel = Kernel("mm", named("mm", product), ("CUDA",))
    assert calls.calls_of(make_step(), [kernel]) == {}


class Queue:
    """A chip of 6 ms a call that works through what the host gives it in order, and its torch module."""

    device_ms = 6.0

    def __init__(self):
        self.free_at = 0.0  # when the last of what was given is done, ms
        self.waits = 0

    def is_available(self):
        return True

    def call(self, host_ms=0.0):
        time.sleep(host_ms / 1000)
        self.free_at = max(self.free_at, self.now()) + self.device_ms

    def now(self):
        return 1000 * time.perf_counter()

    def synchronize(self):
        self.waits += 1
        time.sleep(max(0.0, self.free_at - self.now()) / 1000)

    def Event(self, enable_timing):  # noqa: N802 - torch's name
        queue = self

        class Event:
            def record(self):
                self.at = queue.free_at = max(queue.free_at, queue.now())

            def synchronize(self):
                queue.synchronize()

            def elapsed_time(self, end):
                return end.at - self.at

        assert enable_timing
        return Event()


@pytest.mark.parametrize(("host_ms", "longer"), [(1, 6), (12, 12)])
def test_a_call_takes_what_the_slower_of_host_and_device_needs(monkeypatch, host_ms, longer):
    queue = Queue()
    monkeypatch.setattr(torch, "get_device_module", lambda: queue)
    assert longer <= timing.call_ms(lambda: queue.call(host_ms), repeats=3) < 1.35 * longer


def test_a_step_is_waited_for(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch, "get_device_module", lambda: queue)
    assert timing.step_ms(lambda: [queue.call() for _ in range(3)]) == pytest.approx(18, rel=0.3)


def test_without_an_accelerator_the_host_s_time_counts_and_the_first_ones_do_not(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cpu)
    for measure, uncounted in ((timing.call_ms, 2 * timing.BACK_TO_BACK), (timing.step_ms, 1)):
        sleeps = iter([0.1] * uncounted + [0.004] * 100)
        assert 4 <= measure(lambda s=sleeps: time.sleep(next(s)), repeats=1) < 50
