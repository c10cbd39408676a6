"""FlagGems' real kernels on a GPU: gradients operator by operator, then verl's real engine with ten of them routed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "flaggems_routing.py"


@pytest.fixture(scope="module")
def gems():
    pytest.importorskip("flag_gems")
    from verl_fl_overlay.flaggems import library

    return library.load()


@pytest.fixture
def router(gems):
    from verl_fl_overlay.flaggems.choice import select
    from verl_fl_overlay.flaggems.routing import Router
    from verl_fl_overlay.settings import Settings

    def make(*names, unsafe=()):
        return Router(select(Settings.of(ops=names, unsafe_ops=unsafe), gems).kernels)

    return make


def gradients(function, *shapes):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(shape, generator=generator).add_(0.5).cuda().requires_grad_() for shape in shapes]
    result = function(*inputs)
    if result.requires_grad:
        result.square().sum().backward()
    return result.detach(), [tensor.grad for tensor in inputs]


KEPT = {
    "mul": (("mul",), torch.mul, [(64, 64), (64, 64)]),
    "div.Tensor": (("true_divide",), torch.div, [(64, 64), (64, 64)]),
    "where.self": (("where_self",), lambda a, b: torch.where(a > b, a, b), [(64, 64), (64, 64)]),
    "pow": (("pow_tensor_scalar",), lambda a: a**2.5, [(64, 64)]),
    "cat": (("cat",), lambda a, b: torch.cat([a, b]), [(64, 64), (32, 64)]),
    "softmax": (("log_softmax", "log_softmax_backward"), lambda a: a.log_softmax(-1), [(64, 256)]),
    "silu": (("silu", "silu_backward"), torch.nn.functional.silu, [(64, 64)]),
    "rms_norm, an autograd.Function": (
        ("rms_norm",),
        lambda x, w: torch.rms_norm(x, (64,), w, 1e-6),
        [(2, 16, 64), (64,)],
    ),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_gradients_through_real_kernels_are_the_native_ones(router, kind):
    names, function, shapes = KEPT[kind]
    expected, expected_gradients = gradients(function, *shapes)
    routed = router(*names)
    routed.enter()
    try:
        found, found_gradients = gradients(function, *shapes)
    finally:
        routed.leave()
    assert all(gradient is not None for gradient in found_gradients)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-2, atol=1e-2)


CUT = {
    "true_divide.Tensor": ("true_divide", torch.true_divide, [(64, 64), (64, 64)]),
    "tile": ("tile", lambda a: a.tile((2, 2)), [(8, 8)]),
    "hstack": ("hstack", lambda a, b: torch.hstack([a, b]), [(8, 8), (8, 8)]),
}


@pytest.mark.parametrize("key", CUT)
def test_what_is_left_out_really_cuts_the_gradient(router, key):
    name, function, shapes = CUT[key]
    routed = router(name, unsafe=(key,))
    routed.enter()
    try:
        _, found = gradients(function, *shapes)
    finally:
        routed.leave()
    assert found == [None] * len(shapes)


def test_layer_norms_backward_is_really_wrong_for_three_dimensions(router):
    """When this fails, FlagGems has repaired it: give the row in ``faults.FAULTS`` that version as its ``until``."""

    def layer_norm(x, w, b):
        return torch.nn.functional.layer_norm(x, (64,), w, b)

    shapes = [(2, 16, 64), (64,), (64,)]
    _, expected = gradients(layer_norm, *shapes)
    keys = ("native_layer_norm", "native_layer_norm_backward")
    routed = router("layer_norm", "layer_norm_backward", unsafe=keys)
    routed.enter()
    try:
        _, found = gradients(layer_norm, *shapes)
    finally:
        routed.leave()
    assert not torch.allclose(found[0], expected[0], rtol=0.1, atol=0.1)


def drawn():
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.empty(64, device="cuda").normal_(generator=generator)


def square():
    return torch.rand(32, 32, generator=torch.Generator().manual_seed(0)).cuda()


def of_a_loss():
    x = square().requires_grad_()
    torch.nn.functional.mse_loss(x, torch.zeros_like(x)).backward()
    return x.grad


def of_a_softmax(operator, output):
    return operator(square() * 3, output(square().t(), 1).t().contiguous().t(), 1, torch.float32)


WRONG = {
    "_softmax": lambda: square().t().softmax(1),
    "_softmax_backward_data": lambda: of_a_softmax(torch.ops.aten._softmax_backward_data, torch.softmax),
    "_log_softmax_backward_data": lambda: of_a_softmax(torch.ops.aten._log_softmax_backward_data, torch.log_softmax),
    "topk": lambda: square().t().topk(4).values,
    "normal_": lambda: drawn() - drawn(),
    "mse_loss_backward": of_a_loss,
}
"""Those of the table's faults that show without writing outside of a tensor."""


@pytest.mark.parametrize("key", WRONG)
def test_what_the_table_calls_wrong_is_really_wrong(gems, key):
    """When this fails, FlagGems has mended it: give the row in ``faults.FAULTS`` that version as its ``until``."""
    from verl_fl_overlay.flaggems.routing import Router

    faulty = [kernel for kernel in gems.kernels if kernel.key == key and kernel.fault]
    if not faulty:
        pytest.skip(f"FlagGems {gems.version} has no fault in {key}")
    expected = WRONG[key]()
    routed = Router(faulty)
    routed.enter()
    try:
        found = WRONG[key]()
    finally:
        routed.leave()
    assert not routed.failed
    assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(WRONG[key](), expected)


ENABLED_INSIDE = """
import contextlib
import json
import torch
from verl_fl_overlay import phase
from verl_fl_overlay.features.enablers import Enablers
from verl_fl_overlay.features.flaggems import Routing
from verl_fl_overlay.flaggems.dispatcher import registered_in
from verl_fl_overlay.settings import Settings

settings = Settings.of(ops=("mm", "mul"))
features = [Routing(settings), Enablers(settings)]
for feature in features:
    feature.start()
a = torch.rand(64, 64, device="cuda", requires_grad=True)
with phase.training.inside("train"):
    import flag_gems
    with contextlib.suppress(RuntimeError):  # before 2.12 torch refuses a second kernel, and FlagGems stops there
        flag_gems.enable(unused=[])
    out = a.tile((2, 2))
    if out.requires_grad:
        out.sum().backward()
routing, enablers = (feature.describe() for feature in features)
places = {key: "flag_gems" in registered_in(key, "CUDA") for key in ("mm", "add.Tensor", "tile")}
print(json.dumps([routing, enablers, places, a.grad is None]))
"""


def test_all_of_it_enabled_by_somebody_inside_the_phase_is_told_with_what_it_cuts():
    pytest.importorskip("flag_gems")
    done = subprocess.run(
        [sys.executable, "-c", ENABLED_INSIDE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    routing, enablers, places, cut = json.loads(done.stdout.strip().splitlines()[-1])
    assert cut is places["tile"]
    assert "_softmax_backward_data" in enablers["harmful"]
    assert f"{len(enablers['held'])} operators are FlagGems' in training and between" in enablers["state"]
    assert places["add.Tensor"]
    assert ("tile" in enablers["harmful"]) is ("tile" in enablers["held"]) is places["tile"]
    assert ("mm" in enablers["held"]) is places["mm"] is ("held by others" in routing["state"])


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    pytest.importorskip("verl", exc_type=ImportError)
    file = tmp_path_factory.mktemp("figures") / "flaggems.json"
    subprocess.run([sys.executable, BENCHMARK, "--json", file], check=True, timeout=800)
    return json.loads(file.read_text())


@pytest.mark.xdist_group("figures")
def test_verls_engine_gives_the_native_log_probs_and_grad_norm(figures):
    assert figures["log_probs_largest_units"] <= 2
    assert figures["grad_norm_apart_percent"] <= 1
    assert all(step["grad_norm"] > 0 for step in figures["routed"]["steps"])
    assert figures["routed"]["problems"] == []


@pytest.mark.xdist_group("figures")
def test_copy_mul_and_mm_are_flaggems_inside_and_native_outside(figures):
    sys.path.insert(0, str(BENCHMARK.parent))
    from flaggems_routing import triton_kernels

    record = figures["routed"]["record"]
    assert all(record[f"aten::{key}"] > 0 for key in ("copy_", "mul.Tensor", "mm"))
    assert triton_kernels(figures["native"]["inside"]) == 0
    assert any("mm_kernel" in name for name in figures["routed"]["inside"])
    assert triton_kernels(figures["routed"]["inside"]) > 100
    assert sum(figures["routed"]["outside"].values()) >= 3
    assert triton_kernels(figures["routed"]["outside"]) == 0


@pytest.mark.xdist_group("figures")
def test_two_hundred_steps_do_not_grow(figures):
    early, late = figures["routed"]["memory_after_20"], figures["routed"]["memory_at_end"]
    assert late["allocated"] == early["allocated"]
    assert late["reserved"] <= early["reserved"]
    assert late["resident"] - early["resident"] < 64 << 20


@pytest.mark.xdist_group("figures")
def test_entering_and_leaving_is_cheap(figures):
    phase = figures["routed"]["phase"]
    assert phase["40"]["enter_ms"] + phase["40"]["leave_ms"] < 3
    assert phase["all"]["enter_ms"] + phase["all"]["leave_ms"] < 10
    assert phase["all"]["failed"] == {}
