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

from fused.test_adam import each_from_the_other_s_checkpoint, steps  # noqa: E402
from fused.test_fused import NORMS, make  # noqa: E402

from verl_fl_overlay.kernels.adam import FusedAdam  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.model import FusedModules  # noqa: E402
from verl_fl_overlay.kernels.triton import gate, rotary  # noqa: E402
from verl_fl_overlay.kernels.triton.rms_norm import rms_norm  # noqa: E402
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
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1, 7), (2048, 1000)], ids=str)
def test_silu_and_mul_matches_float64(shape, dtype, bound):
    torch.manual_seed(1)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) * 3 for _ in range(2)]
    assert_close(gate.silu_and_mul, lambda g, u: torch.nn.functional.silu(g) * u, inputs, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1, 7), (9000, 1000), (4096, 128), (40, 8192)], ids=str)
def test_rms_norm_matches_float64(shape, dtype, bound):
    torch.manual_seed(1)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) * 3, torch.randn(shape[-1], device="cuda", dtype=dtype)]

    def reference(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    assert_close(lambda x, w: rms_norm(x, w, 1e-6), reference, inputs, bound)


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


def test_a_compiled_model_stays_native_inside(monkeypatch):
    calls = []
    for file, name in ((gate, "silu_and_mul"), (rotary, "rotate")):
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
    assert "differs by" in agreement.checks()[f"rms_norm in WithoutMean, {name}"]
    assert torch.equal(torch.cuda.get_rng_state(), random_numbers)
