"""What looks like a norm, a gated MLP or a rotation that has a kernel, and computes something else, stays native."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from verl_fl_overlay.kernels import rotary  # noqa: E402
from verl_fl_overlay.kernels.norm_torch import Variant  # noqa: E402

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
        OfGroups,
        OfHalf,
        OfMagnitudes,
        EpsilonOutside,
        EpsilonForgotten,
        Clamped,
        ClampedAfter,
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


class OnePlusWeight(Norm):
    def forward(self, x):
        return (1 + self.weight.float()).mul(self.normalised(x.float())).to(x.dtype)


class WithoutMean(Norm):
    def normalised(self, x):
        return super().normalised(x - x.mean(-1, keepdim=True))


class RoundedOnce(Norm):
    def forward(self, x):
        return (self.weight * self.normalised(x.float())).to(x.dtype)


class Weightless(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


VARIANTS = {
    Norm: Variant(rounds=True),
    RoundedOnce: Variant(),
    transformers.models.gpt_oss.modeling_gpt_oss.GptOssRMSNorm: Variant(),
    transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm: Variant(1.0),
    OnePlusWeight: Variant(1.0),
    transformers.models.cohere.modeling_cohere.CohereLayerNorm: Variant(centred=True),
    WithoutMean: Variant(centred=True, rounds=True),
    Weightless: Variant(),
}


@DTYPES
@pytest.mark.parametrize("size", [8, 64, 8192])
@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_of_norms_are_told_apart(kind, size, dtype, kernels, fuse, agreement):
    norm = kind(size).to(dtype)
    for weight in norm.parameters():
        nn.init.normal_(weight)
    values = (torch.randn(4, size) + 1).to(dtype)
    expected = norm(values)
    fuse(norm)
    assert verdict(agreement, norm, values) == "same"
    assert kernels.variant == VARIANTS[kind]._replace(**({"rounds": False} if dtype == torch.float32 else {}))
    torch.testing.assert_close(norm(values), expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_weight_in_fp32_beside_values_in_bf16(rounded, kernels, fuse, agreement):
    """As gpt-oss keeps its norms; Llama's norm gives fp32 then, which the kernel does not."""
    norm = (RoundedOnce if rounded else Norm)(64)
    nn.init.normal_(norm.weight)
    values = torch.randn(4, 64).bfloat16()
    expected = norm(values)
    fuse(norm)
    assert (verdict(agreement, norm, values) == "same") == rounded
    torch.testing.assert_close(norm(values), expected)


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


class Bilinear(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class Halves(nn.Module):
    """Gate and up in one projection, as in Phi-3 and GLM-4."""

    def __init__(self, activation=functional.silu, size=8):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(size, 2 * size, bias=False), nn.Linear(size, size, bias=False)
        self.activation_fn = activation

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class UpFirst(Halves):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class Interleaved(Halves):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(up * self.activation_fn(gate))


class Thirds(MLP):
    """Each projection goes into the next."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(self.gate_proj(x))))


class AlmostGelu(MLP):
    """Differs from GELU by less than bf16 shows."""

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj((functional.gelu(gate) + 1e-3 * functional.sigmoid(gate)) * self.up_proj(x))


ACTIVATIONS = {
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
        Bilinear,
        AlmostGelu,
        Interleaved,
        Thirds,
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


class Inline(nn.Module):
    """As LFM2 and Mixtral name the projections; the activation is no attribute."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*sizes) for sizes in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class WithDropout(MLP):
    """With a dropout that does nothing, as in Seed-OSS."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(super().forward(x))


GATES = {
    "silu": (lambda: MLP(), "silu"),
    "silu in place": (lambda: MLP(nn.SiLU(inplace=True)), "silu"),
    "gelu": (lambda: MLP(nn.GELU()), "gelu"),
    "tanh": (lambda: MLP(nn.GELU(approximate="tanh")), "gelu_tanh"),
    "inline": (Inline, "silu"),
    "names swapped": (Swapped, "silu"),
    "no dropout": (WithDropout, "silu"),
    "halves": (Halves, ("silu", True)),
    "halves with gelu": (lambda: Halves(nn.GELU()), ("gelu", True)),
    "halves, up first": (UpFirst, ("silu", False)),
}


@DTYPES
@pytest.mark.parametrize("name", GATES)
def test_variants_of_gates_are_told_apart(name, dtype, kernels, fuse, agreement):
    make, variant = GATES[name]
    mlp, values = make().to(dtype), torch.randn(3, 8).to(dtype).requires_grad_()
    upstream = torch.randn(3, 8).to(dtype)
    tensors = [values, *mlp.parameters()]

    def run():
        result = mlp(values)
        return result.detach(), *torch.autograd.grad(result, tensors, upstream)

    expected = run()
    fuse(mlp)
    assert verdict(agreement, mlp, values) == "same"
    assert kernels.variant == variant
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(run(), expected, rtol=tolerance, atol=tolerance)


def test_a_weight_that_is_broadcast_is_not_read_out_of_bounds(kernels, fuse):
    norm = Norm(1)
    expected = norm(torch.arange(8.0))
    fuse(norm)
    torch.testing.assert_close(norm(torch.arange(8.0)), expected)
    assert not kernels.calls["norm"]
    with pytest.raises(RuntimeError, match="must match the size"):
        fuse(wide := Norm(3)) and wide(torch.arange(8.0))


def test_projections_that_are_changed_later_are_not_read_out_of_bounds(kernels, fuse):
    mlp, values = MLP(), torch.randn(3, 8)
    fuse(mlp)
    mlp(values)
    mlp.up_proj = nn.Linear(8, 1)
    before = kernels.calls["gated"]
    twin = MLP()
    twin._modules = mlp._modules
    torch.testing.assert_close(mlp(values), twin(values))
    assert kernels.calls["gated"] == before


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
