"""Every way in which models rotate q and k runs on the kernel, and calls that it has no code for run natively."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
import types

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fused.test_fused import assert_same, make, step  # noqa: E402
from verl_fl_overlay.kernels import rotary  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.model import FusedModules  # noqa: E402

LENGTH, SIZE = 7, 16

PLAIN = "apply_rotary_pos_emb"

WAYS = {
    "halves": ("qwen2", PLAIN, "qk", (2, LENGTH, SIZE), {}),
    "one row of angles for all": ("qwen2", PLAIN, "qk", (1, LENGTH, SIZE), {}),
    "tokens before heads": ("llama", PLAIN, "tokens first", (2, LENGTH, SIZE), {"unsqueeze_dim": 2}),
    "fp32 angles": ("olmo2", PLAIN, "qk", (2, LENGTH, SIZE), {"fp32": True}),
    "neighbours in fp32": ("cohere2", PLAIN, "qk", (2, LENGTH, SIZE), {}),
    "a part, neighbours": ("glm", PLAIN, "qk", (2, LENGTH, SIZE // 2), {}),
    "a part, halves": ("glm4_moe", PLAIN, "qk", (2, LENGTH, SIZE // 2), {}),
    "a part, halves, cat at once": ("phi3", PLAIN, "qk", (2, LENGTH, SIZE // 2), {}),
    "a part of any number": ("nemotron", PLAIN, "qk", (2, LENGTH, 6), {}),
    "a part, gated attention": ("qwen3_next", PLAIN, "qk", (2, LENGTH, SIZE // 4), {}),
    "neighbours by the first half of fp32 angles": ("ernie4_5", PLAIN, "qk", (2, LENGTH, SIZE), {"fp32": True}),
    "neighbours that come out as halves": (
        "deepseek_v3",
        "apply_rotary_pos_emb_interleave",
        "qk",
        (2, LENGTH, SIZE),
        {},
    ),
    "three positions": (
        "qwen2_vl",
        "apply_multimodal_rotary_pos_emb",
        "qk",
        (3, 2, LENGTH, SIZE),
        {"mrope_section": [2, 3, 3]},
    ),
    "patches": ("qwen2_5_vl", "apply_rotary_pos_emb_vision", "patches", (LENGTH, SIZE), {"fp32": True}),
    "an angle for each pair": ("gpt_oss", "_apply_rotary_emb", "q", (2, 1, LENGTH, SIZE // 2), {}),
    "one tensor": ("gemma4", PLAIN, "q, tokens first", (2, LENGTH, SIZE), {"unsqueeze_dim": 2}),
    "the last part of one tensor": ("deepseek_v4", PLAIN, "q", (2, LENGTH, SIZE // 4), {"fp32": True}),
    "no batch of angles": ("mistral", PLAIN, "qk", (LENGTH, SIZE), {"unsqueeze_dim": 0}),
    "complex, tokens before heads": ("llama4", "apply_rotary_emb", "tokens first", (2, LENGTH, SIZE // 2), {}),
    "complex": ("deepseek_v2", "apply_rotary_emb", "qk", (2, LENGTH, SIZE // 2), {}),
}
"""Way to rotate -> a family's function, its heads, the shape of cos, and what else it is given."""


def function_of(family, name):
    """Return a copy of the function in transformers, which stays as it is."""
    try:
        file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {family}")
    function = getattr(file, name)
    return types.FunctionType(function.__code__, vars(file), name, function.__defaults__)


def inputs_of(way, dtype, device="cpu"):
    """Return a function of transformers, its heads, its angles and its other arguments."""
    family, name, kind, shape, rest = WAYS[way]
    function, rest = function_of(family, name), dict(rest)
    generator = torch.Generator().manual_seed(0)
    angle = torch.float32 if rest.pop("fp32", False) else dtype

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    heads = []
    for count in (3, 2) if "q," not in kind and kind != "q" else (3,):
        each = drawn(LENGTH, count, SIZE) if kind == "patches" else drawn(2, count, LENGTH, SIZE)
        heads.append((each.transpose(1, 2) if "tokens first" in kind else each).to(device, dtype))
    cos, sin = (drawn(*shape).to(device, angle) for _ in range(2))
    freqs = "freqs_cis" in inspect.signature(function).parameters
    return function, heads, [torch.complex(cos.float(), sin.float())] if freqs else [cos, sin], rest


def results_and_gradients(function, heads, angles, rest):
    leaves = [each.detach().clone().requires_grad_() for each in heads]
    results = function(*leaves, *angles, **rest)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.linspace(-1, 1, each.numel(), device=each.device).view(each.shape).to(each) for each in results]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_rotate_runs_on_the_kernel(way, dtype, kernels, agreement):
    function, heads, angles, rest = inputs_of(way, dtype)
    expected = results_and_gradients(function, heads, angles, rest)
    rotary.replace(function, agreement)
    function(*heads, *angles, **rest)  # this one is checked
    kernels.calls["rotate"] = 0
    found = results_and_gradients(function, heads, angles, rest)
    assert set(agreement.checks().values()) == {"same"}
    assert kernels.calls["rotate"] == 1
    bound = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert float((one - other).detach().float().norm() / other.detach().float().norm()) < bound
    rotary.restore(function)
    function(*heads, *angles, **rest)
    assert kernels.calls["rotate"] == 1


def plain(family="qwen2"):
    """Return a family's rotation, q, k, cos and sin, all of which fit."""
    function, heads, angles, _ = inputs_of("halves", torch.float32)
    return function, [*heads, *angles]


def outcome(function, inputs, rest):
    """Return what a call gives, or what it raises."""
    try:
        return function(*inputs, **rest)
    except Exception as error:
        return type(error)


UNFIT = {
    "cos and sin of one token": lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
    "sin of one row": lambda q, k, cos, sin: (q, k, cos, sin[:1]),
    "sin of one token": lambda q, k, cos, sin: (q, k, cos, sin[:, :1]),
    "sin of other pairs": lambda q, k, cos, sin: (q, k, cos, sin[..., :8]),
    "heads of one row": lambda q, k, cos, sin: (q[:1], k[:1], cos, sin),
    "k of one row": lambda q, k, cos, sin: (q, k[:1], cos, sin),
    "k of one token": lambda q, k, cos, sin: (q, k[:, :, :1], cos, sin),
    "angles of fewer tokens": lambda q, k, cos, sin: (q, k, cos[:, :5], sin[:, :5]),
    "angles of more rows": lambda q, k, cos, sin: (q, k, cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)),
    "k of another length": lambda q, k, cos, sin: (q, k[:, :, :5], cos, sin),
    "k of another size": lambda q, k, cos, sin: (q, k[..., :8], cos, sin),
    "k of another type": lambda q, k, cos, sin: (q, k.bfloat16(), cos, sin),
    "k without a batch": lambda q, k, cos, sin: (q, k[0], cos, sin),
    "angles for each head": lambda q, k, cos, sin: (q, k[:, :1].expand_as(q), cos[:, :3, None], sin[:, :3, None]),
    "a fourth dimension": lambda q, k, cos, sin: (q, k, cos[None], sin[None]),
    "a gradient to cos": lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin),
    "a gradient to sin": lambda q, k, cos, sin: (q, k, cos, sin.requires_grad_()),
    "no tokens": lambda q, k, cos, sin: (q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0]),
    "no sin": lambda q, k, cos, sin: (q, k, cos),
    "one too many": lambda q, k, cos, sin: (q, k, cos, sin, 1, 2),
    "numbers": lambda q, k, cos, sin: (q, k, 1.0, 0.0),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_calls_that_the_kernel_would_read_out_of_bounds_run_or_raise_as_natively(
    unfit, kernels, agreement, monkeypatch
):
    function, inputs = plain()
    changed = UNFIT[unfit](*inputs)
    expected = outcome(function, changed, {})
    rotary.replace(function, agreement)
    function(*(each.detach() for each in inputs))  # this form is checked, and found to be right
    rotated, right = [], kernels.rotate
    monkeypatch.setattr(
        kernels, "rotate", lambda heads, *more: rotated.append(heads[0].data_ptr()) or right(heads, *more)
    )
    found = outcome(function, changed, {})
    assert changed[0].data_ptr() not in rotated, "the check of another form rotates tensors of its own"
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "unfit",
    [
        lambda q, k, cos, sin: (q, k, cos[:, 0], sin[:, 0]),
        lambda q, k, cos, sin: (q, k, cos[:2], sin[:2]),
        lambda q, k, cos, sin: (q, k, cos[:, :, :1], sin[:, :, :1]),
    ],
    ids=["no batch", "two positions", "one token"],
)
@pytest.mark.parametrize("sections", [[2, 3, 3], [8, 0, 0], [2, 3, 2], [4, 4], [2, 2, 2, 2], (2, 3, 3), 3, 8], ids=str)
def test_angles_of_three_positions_that_do_not_fit(unfit, sections, kernels, agreement):
    function, heads, angles, _ = inputs_of("three positions", torch.float32)
    changed, rest = unfit(*heads, *angles), {"mrope_section": sections}
    both = [(changed, rest), ((*heads, *angles), rest)]
    expected = [outcome(function, *each) for each in both]
    rotary.replace(function, agreement)
    for each, native in zip(both, expected, strict=True):
        found = outcome(function, *each)
        if isinstance(native, type):
            assert found is native
        else:
            torch.testing.assert_close(found, native, rtol=2e-5, atol=2e-5)


def test_a_call_by_names_is_the_same_call(kernels, agreement):
    function, (q, k, cos, sin) = plain()
    expected = function(q, k, cos, sin)
    rotary.replace(function, agreement)
    function(q, k, cos, sin)
    kernels.calls["rotate"] = 0
    torch.testing.assert_close(function(sin=sin, cos=cos, k=k, q=q), expected)
    torch.testing.assert_close(function(q, k, cos, sin=sin), expected)
    assert kernels.calls["rotate"] == 2
    torch.testing.assert_close(function(q, k, cos, sin, 1), expected)
    assert kernels.calls["rotate"] == 4, "an argument may change how it rotates, so this call is checked"


def test_an_argument_that_holds_a_tensor_is_left_to_native_code(kernels, agreement):
    def shifted(q, k, cos, sin, by):
        return q * cos[:, None] + by, k * cos[:, None] + by

    _, inputs = plain()
    by = torch.ones(())
    found = rotary.in_place_of(shifted, agreement)(*inputs, by)
    torch.testing.assert_close(found, shifted(*inputs, by), rtol=0, atol=0)
    assert "whose changes cannot be seen" in next(iter(agreement.checks().values()))


def test_a_function_whose_arguments_change_at_each_call_is_not_tried_for_ever(kernels, agreement, monkeypatch):
    monkeypatch.setattr(rotary, "MOST_CHECKS", 3)
    tried = []

    def at(q, k, cos, sin, place):
        tried.append(place)
        return native(q, k, cos, sin)

    native, inputs = plain()
    run, expected = rotary.in_place_of(at, agreement), native(*inputs)
    for place in range(5):
        torch.testing.assert_close(run(*inputs, place), expected)
    assert tried[-2:] == [3, 4], "native code runs once for each of these"
    assert kernels.calls["rotate"] == 2 * 3


TRANSFORMS = {
    "vmap": lambda f, q: torch.func.vmap(f)(torch.stack([q, 2 * q])),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).square().sum())(q),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_native_code_runs_under_transforms_and_a_first_call_there_decides_nothing(transform, kernels, agreement):
    function, (q, k, cos, sin) = plain()

    def of_q(q):
        return function(q, k, cos, sin)[0]

    expected = TRANSFORMS[transform](of_q, q)
    rotary.replace(function, agreement)
    torch.testing.assert_close(TRANSFORMS[transform](of_q, q), expected, rtol=0, atol=0)
    assert not kernels.calls["rotate"]
    of_q(q)
    assert kernels.calls["rotate"] == 2, "its check and itself"


def test_native_code_runs_in_forward_mode(kernels, agreement):
    from torch.autograd import forward_ad

    function, (q, k, cos, sin) = plain()
    rotary.replace(function, agreement)
    with forward_ad.dual_level():
        found = function(forward_ad.make_dual(q, 2 * q), k, cos, sin)[0]
        value, tangent = forward_ad.unpack_dual(found)
    torch.testing.assert_close(tangent, 2 * value)
    assert not kernels.calls["rotate"]


def test_all_functions_of_a_file_but_those_that_call_one_another(kernels):
    def names(*families):
        files = [importlib.import_module(f"transformers.models.{each}.modeling_{each}") for each in families]
        module = torch.nn.ModuleList(
            [type("Own", (torch.nn.Module,), {"__module__": file.__name__})() for file in files]
        )
        return sorted(each.__name__ for each in rotary.functions(module))

    assert names("qwen2") == [PLAIN]
    assert names("qwen2_vl") == ["apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb_vision"]
    assert names("gpt_oss") == ["_apply_rotary_emb"]
    source = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    rotary.replace(source._apply_rotary_emb, Agreement())
    try:
        assert names("gpt_oss") == [], "a second model finds that all is done"
    finally:
        rotary.restore(source._apply_rotary_emb)
    assert names("gpt_oss") == ["_apply_rotary_emb"]


def test_what_a_file_holds_of_others_is_left_alone(kernels, fuse, monkeypatch):
    def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return q, k

    source = transformers.models.qwen2.modeling_qwen2
    monkeypatch.setattr(source, PLAIN, liger_rotary_pos_emb)
    assert fuse(make("Qwen2"), ("rotary",)).counts == {}
    assert source.apply_rotary_pos_emb is liger_rotary_pos_emb


def test_removal_is_exact_whatever_was_put_into_the_file_since(kernels, agreement, monkeypatch):
    source = transformers.models.qwen2.modeling_qwen2
    native = source.apply_rotary_pos_emb
    before = native.__code__, native.__defaults__, native.__kwdefaults__, dict(vars(native)), inspect.signature(native)
    made = FusedModules(("rotary",), agreement)
    made.fuse(make("Qwen2"))
    assert inspect.signature(native) == before[-1]
    monkeypatch.setattr(source, PLAIN, theirs := lambda q, k, cos, sin: (q, k))
    made.remove()
    assert source.apply_rotary_pos_emb is theirs
    after = native.__code__, native.__defaults__, native.__kwdefaults__, dict(vars(native)), inspect.signature(native)
    assert after == before
    _, inputs = plain()
    native(*inputs)
    assert not kernels.calls["rotate"]


def test_a_file_that_imported_the_function_by_name_runs_the_kernel(kernels, fuse):
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    fuse(make("Qwen2"), ("rotary",))
    apply_rotary_pos_emb(*plain()[1])
    assert kernels.calls["rotate"] == 2


LOAD = """
import sys, torch
model = torch.load('model.pt', weights_only=False)
from transformers.models.qwen2 import modeling_qwen2
assert model.rotation is modeling_qwen2.apply_rotary_pos_emb
assert "verl_fl_overlay" not in sys.modules
print(model(input_ids=torch.arange(7)[None]).logits.norm().item())
"""


def test_a_fused_model_is_saved_whole_and_loads_without_the_overlay(kernels, fuse, tmp_path):
    from processes import output

    source = transformers.models.qwen2.modeling_qwen2
    model = make("Qwen2")
    model.rotation = source.apply_rotary_pos_emb  # as transformers 5 keeps it in each attention module
    fuse(model, ("rotary",))
    expected = model(input_ids=torch.arange(7)[None]).logits.detach()
    assert kernels.calls["rotate"]
    torch.save(model, tmp_path / "model.pt")
    assert float(output(LOAD, env={}, cwd=tmp_path)) == pytest.approx(float(expected.norm()), 1e-5)


def test_copies_of_a_fused_model_and_models_made_before_are_pickled_too(kernels, agreement):
    source = transformers.models.qwen2.modeling_qwen2
    earlier, model = make("Qwen2"), make("Qwen2")
    for each in (earlier, model):
        each.rotation = source.apply_rotary_pos_emb
    made = FusedModules(("rotary",), agreement)
    made.fuse(model)
    later = make("Qwen2")
    twin = copy.deepcopy(model)
    for removed in (False, True):
        for each in (earlier, model, later, twin):
            assert_same(step(pickle.loads(pickle.dumps(each))), step(earlier))
        if not removed:
            made.remove()
            kernels.calls["rotate"] = 0
    assert not kernels.calls["rotate"]
    assert sys.modules[source.__name__] is source
