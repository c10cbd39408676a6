"""Tuning on a CPU, with stand-in kernels: a step is recorded, what is faster is chosen, a break is gone on from."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

from verl_fl_overlay.flaggems import plot, tune  # noqa: E402
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
    calls = tune.record(make_step(), gems(mm=named("mm", product), mul=named("mul", None)))
    assert calls["mm"].total() == 2  # the product, and the gradient of the weight
    shapes = {tuple(leaf.size for leaf in call[0] if isinstance(leaf, tune.Shape)) for call in calls["mm"]}
    assert shapes == {((8, 64), (64, 32)), ((64, 8), (8, 32))}
    assert calls["mul.Tensor"].total() >= 2


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


def test_a_faster_kernel_is_routed_and_kept_if_whole_steps_agree(tmp_path, monkeypatch):
    times = iter([1.0, 0.5, 1.0, 0.5])
    monkeypatch.setattr(tune, "milliseconds", lambda run: next(times))
    steps = iter([10.0, 8.0])
    monkeypatch.setattr(tune, "whole_step", lambda step: next(steps))
    made = tune.tune(make_step(), gems(mm=named("mm", product)), KEY, "w", tmp_path / "p", say=lambda line: None)
    assert made.chosen == ("mm",)
    assert made.step_ms == {"native": 10.0, "chosen": 8.0}


def test_whole_steps_have_the_last_word(tmp_path, monkeypatch):
    times = iter([1.0, 0.5, 1.0, 0.5])
    monkeypatch.setattr(tune, "milliseconds", lambda run: next(times))
    steps = iter([10.0, 11.0])
    monkeypatch.setattr(tune, "whole_step", lambda step: next(steps))
    made = tune.tune(make_step(), gems(mm=named("mm", product)), KEY, "w", tmp_path / "p", say=lambda line: None)
    assert made.chosen == ()


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


def test_an_expanded_tensor_is_made_again_with_its_strides():
    like = torch.randn(3, 1).expand(3, 5)
    made = tune.Shape(tuple(like.shape), like.stride(), like.dtype, "cpu").make()
    assert made.shape == like.shape
    assert made.stride() == like.stride()


def test_a_call_on_the_cpu_is_not_the_accelerator_s():
    kernel = Kernel("mm", named("mm", product), ("CUDA",))
    assert tune.record(make_step(), FlagGems("x", "x", (kernel,))) == {}
