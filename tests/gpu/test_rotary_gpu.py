"""The real rotary kernel: each layout against float64, and each way in which transformers rotates against its code."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

from fused.test_rotary import WAYS, inputs_of, results_and_gradients  # noqa: E402

from verl_fl_overlay.kernels import pairs, rotary  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402

BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def off(found, exact):
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def layouts():
    for size, width, sections in ((24, 12, None), (24, 24, None), (96, 12, [2, 1, 3]), (128, 128, [16, 24, 24])):
        for index, layout in enumerate(pairs.layouts(size, width, sections)):
            yield pytest.param(size, width, bool(sections), layout, id=f"{size}, {width}, {sections}, {index}")


ORDERS = {
    "tokens lie together": lambda x: x.transpose(1, 2),
    "heads lie together": lambda x: x.transpose(1, 2).contiguous(),
    "every second element": lambda x: x.repeat_interleave(2, -1).transpose(1, 2)[..., ::2],
}


@DTYPES
@pytest.mark.parametrize(("size", "width", "positions", "layout"), layouts())
def test_each_layout_matches_float64(size, width, positions, layout, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    batch, length = 3, 37

    def drawn(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    for counts in ((4, 2), (14, 2), (3, 1), (28,)):
        heads = [drawn(batch, length, count, size).to(dtype) for count in counts]
        for order, rows, angle in zip(ORDERS.values(), (1, batch, batch), (dtype, torch.float32, dtype), strict=True):
            shape = [*[3] * positions, rows, length, 2 * width]
            cos, sin = (drawn(*shape).to(angle)[..., step : step + width] for step in (0, 1))
            assert_exact(list(map(order, heads)), cos, sin, layout)


def assert_exact(heads, cos, sin, layout):
    from verl_fl_overlay.kernels.triton.rotary import rotate

    def reference(*heads):
        return tuple(pairs.rotated(each, cos.double(), sin.double(), layout) for each in heads)

    found = results_and_gradients(lambda *heads: rotate(heads, cos, sin, layout), heads, [], {})
    exact = results_and_gradients(reference, [each.double() for each in heads], [], {})
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        assert off(one, other) < BOUNDS[one.dtype]


@DTYPES
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_rotate_is_as_near_to_float64_as_native_is(way, dtype, monkeypatch):
    from verl_fl_overlay.kernels.triton import rotary as triton_rotary

    function, heads, angles, rest = inputs_of(way, dtype, "cuda")
    wide = [each.to(torch.complex128 if each.is_complex() else torch.float64) for each in angles]
    exact = results_and_gradients(function, [each.double() for each in heads], wide, rest)
    native = results_and_gradients(function, heads, angles, rest)
    calls, kernel, agreement = [], triton_rotary.rotate, Agreement()
    monkeypatch.setattr(triton_rotary, "rotate", lambda *inputs: calls.append(1) or kernel(*inputs))
    rotary.replace(function, agreement)
    found = results_and_gradients(function, heads, angles, rest)
    assert set(agreement.checks().values()) == {"same"}
    assert len(calls) == 2, "the check and the call"
    for one, other, right in zip(found, native, exact, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert off(one, right) < 1.2 * off(other, right) + 3e-7


def test_a_backward_has_a_backward():
    function, heads, angles, _ = inputs_of("halves", torch.float32, "cuda")

    def twice(rotate, heads):
        leaves = [each.clone().requires_grad_() for each in heads]
        first = torch.autograd.grad(sum(x.sin().sum() for x in rotate(*leaves)), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.cos().sum() for x in first), leaves)

    exact = twice(lambda *x: function(*x, *(each.double() for each in angles)), [each.double() for each in heads])
    agreement = Agreement()
    rotary.replace(function, agreement)
    found = twice(lambda *x: function(*x, *angles), heads)
    assert set(agreement.checks().values()) == {"same"}
    assert all(off(one, other) < 1e-5 for one, other in zip(found, exact, strict=True))


def test_transforms_run_natively():
    function, heads, angles, _ = inputs_of("halves", torch.float32, "cuda")
    expected = torch.func.jvp(lambda *x: function(*x, *angles), tuple(heads), tuple(heads))
    rotary.replace(function, Agreement())
    found = torch.func.jvp(lambda *x: function(*x, *angles), tuple(heads), tuple(heads))
    torch.testing.assert_close(found, expected)


def test_a_compiled_caller_runs_native_code():
    function, heads, angles, _ = inputs_of("halves", torch.float32, "cuda")
    expected = function(*heads, *angles)
    agreement = Agreement()
    rotary.replace(function, agreement)
    found = torch.compile(lambda *x: function(*x), fullgraph=True)(*heads, *angles)
    torch.testing.assert_close(found, expected)
    assert not agreement.checks()
