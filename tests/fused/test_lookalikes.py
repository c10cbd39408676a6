"""What looks like a norm, a gated MLP or a rotation that has a kernel, and computes something else, stays native."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from verl_fl_overlay.kernels import rotary  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


class Norm(nn.Module):
    """An RMS norm."""

    def __init__(self, size, epsilon=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = epsilon

    def forward(self, x):
        return self.weight * self.normalised(x.float()).to(x.dtype)

    def normalised(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class WithoutMean(Norm):
    def normalised(self, x):
        return super().normalised(x - x.mean(-1, keepdim=True))


class OfGroups(Norm):
    def normalised(self, x):
        return super().normalised(x.unflatten(-1, (4, -1))).flatten(-2)


class OfHalf(Norm):
    def normalised(self, x):
        part = x[..., : x.shape[-1] // 2]
        return x * torch.rsqrt(part.square().mean(-1, keepdim=True) + self.variance_epsilon)


class OfMagnitudes(Norm):
    def normalised(self, x):
        return x / (x.abs().mean(-1, keepdim=True) * (torch.pi / 2) ** 0.5 + self.variance_epsilon)


class EpsilonOutside(Norm):
    def normalised(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class EpsilonForgotten(Norm):
    def normalised(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Clamped(Norm):
    def normalised(self, x):
        return super().normalised(x.clamp(-100, 100))


class ClampedAfter(Norm):
    def normalised(self, x):
        return super().normalised(x).clamp(-2, 2)


class OnePlusWeight(Norm):
    def forward(self, x):
        return (1 + self.weight) * self.normalised(x.float()).to(x.dtype)


class MagnitudeOfWeight(Norm):
    def forward(self, x):
        return self.weight.abs() * self.normalised(x.float()).to(x.dtype)


class InFp32(Norm):
    def forward(self, x):
        return self.weight.float() * self.normalised(x.float())


def verdict(agreement, module, values):
    """Call the module; return what its check found."""
    module(values)
    (found,) = agreement.checks().values()
    return found


@DTYPES
@pytest.mark.parametrize("size", [8, 64, 8192])
@pytest.mark.parametrize(
    "kind",
    [
        transformers.models.cohere.modeling_cohere.CohereLayerNorm,
        WithoutMean,
        OfGroups,
        OfHalf,
        OfMagnitudes,
        EpsilonOutside,
        EpsilonForgotten,
        Clamped,
        ClampedAfter,
        OnePlusWeight,
        MagnitudeOfWeight,
    ],
)
def test_norms_that_look_alike(kind, size, dtype, kernels, fuse, agreement):
    norm = kind(size).to(dtype)
    values = (torch.randn(4, size) + 1).to(dtype)
    expected = norm(values)
    fuse(norm)
    assert "differs by" in verdict(agreement, norm, values)
    torch.testing.assert_close(norm(values), expected, rtol=0, atol=0)


def test_a_norm_that_returns_another_type(kernels, fuse, agreement):
    norm = InFp32(8).bfloat16()
    fuse(norm)
    assert verdict(agreement, norm, torch.randn(2, 8).bfloat16()).startswith("output 0 is (7, 8) bfloat16, natively")


@DTYPES
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-8, 1e-6, 1e-5])
@pytest.mark.parametrize("size", [7, 64, 8192, 32768])
def test_an_rms_norm_is_one_in_every_size_and_type(size, epsilon, dtype, kernels, fuse, agreement):
    norm = Norm(size, epsilon).to(dtype)
    fuse(norm)
    assert verdict(agreement, norm, torch.randn(2, size).to(dtype)) == "same"


class MLP(nn.Module):
    def __init__(self, activation=functional.silu):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act_fn = activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedGate(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class ClampedUp(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


class UpPlusOne(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Bilinear(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "almost silu": lambda x: x * torch.sigmoid(1.1 * x),
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "softplus": functional.softplus,
    "swish with a floor": lambda x: functional.silu(x).clamp(min=-0.2),
    "sigmoid": torch.sigmoid,
}


@DTYPES
@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda f=f: MLP(f), id=name) for name, f in ACTIVATIONS.items()),
        ClampedGate,
        ClampedUp,
        UpPlusOne,
        Swapped,
        Bilinear,
    ],
)
def test_mlps_that_look_alike(make, dtype, kernels, fuse, agreement):
    mlp = make().to(dtype)
    values = torch.randn(3, 8).to(dtype)
    expected = mlp(values)
    fuse(mlp)
    assert "differs by" in verdict(agreement, mlp, values)
    torch.testing.assert_close(mlp(values), expected, rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize(
    "activation", [functional.silu, nn.SiLU(), torch.ops.aten.silu.default], ids=["function", "module", "operator"]
)
def test_a_gated_mlp_is_one_in_every_type(activation, dtype, kernels, fuse, agreement):
    mlp = MLP(activation).to(dtype)
    fuse(mlp)
    assert verdict(agreement, mlp, torch.randn(3, 8).to(dtype)) == "same"


def rotated(q, k, *angles):  # not with the names of a rotation's parameters: models of this file would use it
    cos, sin = angles

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    return tuple(x * cos[:, None] + turned(x) * sin[:, None] for x in (q, k))


ROTATIONS = {
    "backwards": lambda q, k, cos, sin: rotated(q, k, cos, -sin),
    "q alone": lambda q, k, cos, sin: (rotated(q, k, cos, sin)[0], k),
    "normalised": lambda q, k, cos, sin: rotated(functional.normalize(q, dim=-1), k, cos, sin),
    "scaled": lambda q, k, cos, sin: rotated(q * 1.1, k * 1.1, cos, sin),
    "clamped": lambda q, k, cos, sin: rotated(q.clamp(-20, 20), k, cos, sin),
    "angles of the first row": lambda q, k, cos, sin: rotated(q, k, cos[:1], sin[:1]),
    "angles of the token before": lambda q, k, cos, sin: rotated(q, k, cos.roll(1, 1), sin.roll(1, 1)),
    "every second pair": lambda q, k, cos, sin: rotated(q, k, cos, sin * (torch.arange(8) % 2)),
}
"""What has a rotation's parameters, and is not the rotation of any layout."""


def angles(batch, length=4, size=8):
    half = torch.arange(length)[:, None] / 10000 ** (torch.arange(size // 2) / (size // 2))
    whole = torch.cat([half, half], -1).expand(batch, length, size)
    return whole.cos().contiguous(), whole.sin().contiguous()


@DTYPES
@pytest.mark.parametrize(("name", "batch"), itertools.product(ROTATIONS, (1, 2)))
def test_rotations_that_look_alike(name, batch, dtype, kernels, agreement):
    function = ROTATIONS[name]
    inputs = [each.to(dtype) for each in (*(torch.randn(2, heads, 4, 8) for heads in (4, 2)), *angles(batch))]
    found = rotary.in_place_of(function, agreement)(*inputs)
    torch.testing.assert_close(found, function(*inputs), rtol=0, atol=0)
    assert list(agreement.checks().values()) == ["ValueError: it rotates in a way that the kernel does not have"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rotation_that_rounds_to_fp8_in_short_types(dtype, kernels, agreement):
    def rounded(q, k, cos, sin):
        coarse = torch.float32 if q.dtype == torch.float32 else torch.float8_e4m3fn
        return rotated(*(x.to(coarse).to(q.dtype) for x in (q, k)), cos, sin)

    inputs = [each.to(dtype) for each in (*(torch.randn(2, heads, 4, 8) for heads in (4, 2)), *angles(2))]
    found = rotary.in_place_of(rounded, agreement)(*inputs)
    torch.testing.assert_close(found, rounded(*inputs), rtol=0, atol=0)
    (told,) = agreement.checks().values()
    assert "output 0 differs by" in told, "its way to rotate is found in fp32, and its numbers are compared in its type"
