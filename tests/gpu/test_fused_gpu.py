"""The real fused kernels, alone and in Hugging Face models, on a device."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device"),
]

from fused import test_reach  # noqa: E402
from fused.test_adam import each_from_the_other_s_checkpoint, steps  # noqa: E402
from fused.test_fused import NORMS, make  # noqa: E402

from verl_fl_overlay.kernels import gate_torch, norm_torch  # noqa: E402
from verl_fl_overlay.kernels.adam import FusedAdam  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.model import FusedModules  # noqa: E402
from verl_fl_overlay.kernels.triton import gate, rotary  # noqa: E402
from verl_fl_overlay.kernels.triton.rms_norm import norm  # noqa: E402
from verl_fl_overlay.settings.variables import FUSED  # noqa: E402


def off(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def gradients(run, inputs, seed=0):
    leaves = [value.clone().requires_grad_() for value in inputs]
    results = run(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(seed)
    upstream = [torch.randn_like(result) for result in results]
    return [result.detach() for result in results], torch.autograd.grad(results, leaves, upstream)


def assert_close(run, reference, inputs, bound):
    """Compare with float64, values and gradients."""
    found, exact = gradients(run, inputs), None
    leaves = [value.double().requires_grad_() for value in inputs]
    results = reference(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(0)
    upstream = [torch.randn_like(result).double() for result in found[0]]
    exact = results, torch.autograd.grad(results, leaves, upstream)
    for one, other in zip((*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        assert off(one, other.detach()) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("activation", gate_torch.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1, 7), (2048, 1000)], ids=str)
def test_gates_match_float64(shape, activation, dtype, bound):
    torch.manual_seed(1)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) * 3 for _ in range(2)]
    assert_close(*(lambda g, u, f=f: f(g, u, activation) for f in (gate.gated, gate_torch.gated)), inputs, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("activation", gate_torch.ACTIVATIONS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1, 14), (2048, 1536), (300, 7000)], ids=str)
def test_gates_of_halves_match_float64_and_copy_nothing(shape, first, activation, dtype, bound):
    torch.manual_seed(1)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) * 3]
    both = [lambda x, f=f: f(x, activation, first) for f in (gate.gated_halves, gate_torch.gated_halves)]
    assert_close(*both, inputs, bound)
    values = inputs[0].requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = both[0](values)
    result.backward(torch.ones_like(result))
    used, size = torch.cuda.max_memory_allocated() - before, values.numel() * values.element_size()
    assert used <= 2 * size + (3 << 20), "the result, the upstream gradient, and one gradient for both halves"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("variant", [each for each in norm_torch.VARIANTS if not each.rounds], ids=str)
@pytest.mark.parametrize("weight", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1, 7), (9000, 1000), (4096, 128), (40, 8192)], ids=str)
def test_norms_match_float64(shape, weight, variant, dtype, bound):
    torch.manual_seed(1)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) * 3 + 1]
    if weight is not None:
        inputs.append(torch.randn(shape[-1], device="cuda", dtype=weight))
    both = [lambda x, *w, f=f: f(x, *w or [None], 1e-6, variant) for f in (norm, norm_torch.norm)]
    assert_close(*both, inputs, 4e-3 if weight is torch.bfloat16 else 2 * bound)


@pytest.mark.parametrize("size", [128, 3584])
def test_a_norm_that_rounds_first_gives_the_bits_of_the_model(size):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(1)
    native = LlamaRMSNorm(size).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(native.weight)
    values = torch.randn(500, size, device="cuda", dtype=torch.bfloat16)
    differ = [
        float((norm(values, native.weight, 1e-6, norm_torch.Variant(rounds=rounds)) != native(values)).float().mean())
        for rounds in (True, False)
    ]
    assert differ[0] < 1e-3 < differ[1]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_on_real_kernels_is_as_near_to_fp32_as_native_is(name, checkpointing):
    exact = make(name).cuda()
    ids = torch.randint(0, 64, (3, 40), device="cuda")

    def step(model):
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step(exact)
    model = make(name).cuda().bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    native = [off(one, other) for one, other in zip(step(model), expected, strict=True)]
    agreement = Agreement()
    made = FusedModules(FUSED, agreement)
    made.fuse(model)
    try:
        found = [off(one, other) for one, other in zip(step(model), expected, strict=True)]
    finally:
        made.remove()
    told = {what: verdict for what, verdict in agreement.checks().items() if "bfloat16" in what}
    assert set(told.values()) == {"same"}
    assert len(told) >= 3
    assert all(each < 1.5 * max(native) for each in found)
    assert sum(found) < 1.2 * sum(native)


@pytest.mark.parametrize("family", test_reach.RUNNING)
def test_what_a_family_runs_on_real_kernels_is_as_near_to_fp32_as_native_is(family):
    ids = torch.randint(3, 99, (3, 40))

    def step(model):
        model.zero_grad()
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        logits.float().square().mean().backward()
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]
        return [logits.detach().cpu(), torch.cat([each.flatten().cpu() for each in gradients])]

    expected, model = step(test_reach.make(family)), test_reach.make(family).cuda().bfloat16()
    native = [off(one, other) for one, other in zip(step(model), expected, strict=True)]
    agreement = Agreement()
    made = FusedModules(("rms_norm", "gated_mlp", "experts"), agreement)
    made.fuse(model)
    try:
        found = [off(one, other) for one, other in zip(step(model), expected, strict=True)]
        assert made.running == test_reach.RUNNING[family]
    finally:
        made.remove()
    # Rounding may send a token to other experts, here as natively.
    assert all(one < 1.5 * other + 1e-2 for one, other in zip(found, native, strict=True))


def test_a_compiled_model_stays_native_inside(monkeypatch):
    calls = []
    for file, name in ((gate, "gated"), (rotary, "rotate")):
        kernel = getattr(file, name)
        monkeypatch.setattr(file, name, lambda *a, kernel=kernel: calls.append(kernel) or kernel(*a))
    model = make("Llama").cuda().bfloat16()
    ids = torch.randint(0, 64, (2, 16), device="cuda")
    expected = model(input_ids=ids).logits
    made = FusedModules(FUSED, Agreement())
    made.fuse(model)
    try:
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = torch.compile(layer)
        assert off(model(input_ids=ids).logits, expected) < 2e-2
        assert not calls, "all of them are in the layers"
    finally:
        made.remove()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-6)], ids=str)
def test_adam_steps_in_one_kernel_without_copies_and_goes_on_from_a_checkpoint(dtype, bound):
    def make_optimizer():
        generator = torch.Generator("cuda").manual_seed(0)
        values = [torch.randn(size, device="cuda", generator=generator).to(dtype) for size in ((1024, 1024), (512,))]
        return torch.optim.AdamW([torch.nn.Parameter(value) for value in values], lr=1e-2)

    def used_by(optimizer):
        """Return the bytes that a step needs for itself, and the kernels that it launches."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            optimizer.step()
        names = [event.name for event in profiler.events() if "Adam" in event.name or "foreach" in event.name.lower()]
        return torch.cuda.max_memory_allocated() - before, names

    plain, optimizer, made = make_optimizer(), make_optimizer(), FusedAdam(Agreement())
    assert made.fuse(optimizer)
    try:
        for one, other in zip(steps(optimizer, 3, 1), steps(plain, 3, 1), strict=True):
            assert off(one, other) < bound
        (ours, kernels_of_ours), (native, _) = used_by(optimizer), used_by(plain)
        assert any("FusedAdam" in name for name in kernels_of_ours), kernels_of_ours
        assert ours < native / 2
        saved = optimizer.state_dict()
        assert [state["step"].device.type for state in saved["state"].values()] == ["cpu", "cpu"]
        assert saved["param_groups"] == plain.state_dict()["param_groups"]
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch keeps the tensors that it is given
        for one, other in zip(steps(optimizer, 3, 2), steps(plain, 3, 2), strict=True):
            assert off(one, other) < bound
        assert any("FusedAdam" in name for name in used_by(optimizer)[1])
    finally:
        made.remove()
    assert not any("FusedAdam" in name for name in used_by(optimizer)[1])


def test_an_offloaded_engine_and_its_checkpoints(tmp_path):
    pytest.importorskip("verl")
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_FUSED": "0"}
    assert set(each_from_the_other_s_checkpoint(tmp_path, env)) == {"fsdp", "fsdp2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 128, 4096, 8192, 16384])
def test_the_check_tells_a_layer_norm_from_an_rms_norm_on_real_kernels(size, dtype):
    from fused.test_lookalikes import Norm, WithoutMean

    agreement = Agreement()
    made = FusedModules(("rms_norm",), agreement)
    random_numbers = torch.cuda.get_rng_state()
    try:
        for kind in (Norm, WithoutMean):
            norm = kind(size).to("cuda", dtype)
            values = (torch.arange(4 * size, device="cuda").view(4, size).sin() + 1).to(dtype)
            expected = norm(values)
            made.fuse(norm)
            assert off(norm(values), expected) < 2e-2
    finally:
        made.remove()
    name = str(dtype).removeprefix("torch.")
    assert agreement.checks()[f"rms_norm in Norm, {name}"] == "same"
    assert agreement.checks()[f"rms_norm in WithoutMean, {name}"] == "same", "with the variant that subtracts the mean"
    assert torch.equal(torch.cuda.get_rng_state(), random_numbers)
