"""Fused modules in real Hugging Face models: recognised, checked, equal in value and gradient, taken out again."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.features.fused import Fused  # noqa: E402
from verl_fl_overlay.kernels import agreement as fused_check  # noqa: E402
from verl_fl_overlay.kernels.model import FusedModules  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402
from verl_fl_overlay.settings.variables import FUSED  # noqa: E402

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}
NORMS = {"Qwen2": 5, "Qwen3": 9, "Llama": 5, "Mistral": 5}


def make(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for norm in model.modules():
        if "Norm" in type(norm).__name__:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)  # ones would hide a kernel that forgets the weight
    return model


def step(model, batch=3):
    """Return the logits and every parameter's gradient."""
    ids = torch.randint(0, 64, (batch, 7), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 10 * tolerance, name


@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients_are_the_model_s_own(name, kernels, fuse, agreement):
    model = make(name)
    keys = list(model.state_dict())
    expected = step(model)
    made = fuse(model)
    assert made.counts == {"rms_norm": NORMS[name], "gated_mlp": 2, "rotary": 1}
    assert_same(step(model), expected)
    assert set(agreement.checks().values()) == {"same"}
    assert kernels.calls["norm"] > NORMS[name]
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["rms_norm", "gated_mlp", "rotary"])
def test_one_kind_alone(kind, kernels, fuse):
    model = make("Qwen2")
    expected = step(model)
    assert set(fuse(model, (kind,)).counts) == {kind}
    assert_same(step(model), expected)
    assert sum(calls > 0 for calls in kernels.calls.values()) == 1


@pytest.mark.parametrize(("name", "norms"), [("Gemma", 5), ("Gemma2", 9), ("Gemma3Text", 13)])
def test_gemma_s_norms_with_one_plus_weight_and_its_gelu(name, norms, kernels, fuse, agreement):
    model = make(name, **({"layer_types": ["full_attention"] * 2} if name != "Gemma" else {}))
    expected = step(model)
    made = fuse(model)
    assert_same(step(model), expected)
    assert set(agreement.checks().values()) == {"same"}
    assert made.running == {"rms_norm": norms, "gated_mlp": 2, "rotary": 1}


@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "trained"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FalconH1", {"mlp_multipliers": [0.5, 0.25]}),
        ("SeedOss", {"residual_dropout": 0.5, "attention_dropout": 0.0}),
    ],
)
def test_an_mlp_with_factors_or_dropout_of_its_own_computes_them(name, changes, training, kernels, fuse, agreement):
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **changes})
    source = __import__(type(config).__module__.replace("configuration", "modeling"), fromlist=["x"])
    mlp = getattr(source, f"{name}MLP")(config).train(training)
    values = torch.randn(3, 5, 32)

    def run():
        torch.manual_seed(1)
        return mlp(values)

    expected = run()
    fuse(mlp, ("gated_mlp",))
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    told = agreement.checks()[f"gated_mlp in {name}MLP, float32"]
    assert (told == "same") == (name == "SeedOss" and not training), "without dropout it is a gated MLP like another"


def test_two_models_of_a_class_each_have_their_own_activation(kernels, fuse):
    expected = {}
    for activation in ("silu", "relu"):
        model = make("Llama", hidden_act=activation)
        expected[activation] = step(model)
        fuse(model, ("gated_mlp",))
        assert_same(step(model), expected[activation])
    assert kernels.calls["gated"] == 2 + 1, "two layers with SiLU, and their check"
    assert not torch.equal(expected["silu"][0], expected["relu"][0])


def test_an_mlp_that_the_kernel_does_not_match_runs_its_own_forward(kernels, fuse, agreement):
    class TwiceMLP(transformers.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    mlp, values = TwiceMLP(make("Llama").config), torch.randn(3, 32)
    expected = mlp(values)
    made = fuse(mlp)
    torch.testing.assert_close(mlp(values), expected, rtol=0, atol=0)
    assert (made.counts, made.running) == ({"gated_mlp": 1}, {}), "found, and not counted among those that run fused"
    assert "its gate differs by 0.5 from silu" in agreement.checks()["gated_mlp in TwiceMLP, float32"]


def test_a_norm_with_a_second_input_is_left_alone(kernels, fuse):
    class Gated(transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm):
        def forward(self, hidden_states, gate=None):
            return super().forward(hidden_states if gate is None else hidden_states * gate)

    norm, values = Gated(8), torch.randn(2, 8)
    fuse(norm)
    torch.testing.assert_close(norm(values, values), norm(values * values))


def test_modules_may_be_called_by_the_name_of_their_input(kernels, fuse):
    model = make("Qwen2")
    values, layer = torch.randn(3, 32), model.model.layers[0]
    expected = layer.mlp(values), layer.input_layernorm(values)
    fuse(model)
    torch.testing.assert_close((layer.mlp(x=values), layer.input_layernorm(hidden_states=values)), expected)


def test_a_first_call_in_inference_mode_does_not_decide_against_the_kernel(kernels, fuse, agreement):
    model = make("Qwen2")
    expected = step(model)
    fuse(model)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert set(agreement.checks().values()) == {"same"}
    assert_same(step(model), expected)


def test_a_model_that_verl_has_dropped_is_not_kept(kernels, agreement):
    made, model = FusedModules(FUSED, agreement), make("Qwen2")
    made.fuse(model)
    weight = weakref.ref(model.model.norm.weight)
    del model
    gc.collect()
    assert weight() is None
    made.remove()


def test_layer_norm_is_not_taken_for_an_rms_norm(kernels, fuse, caplog):
    norm = torch.nn.LayerNorm(16, bias=False)
    values = torch.randn(2, 16)
    expected = norm(values)
    fuse(torch.nn.Sequential(norm))
    torch.testing.assert_close(norm(values), expected)


def test_a_model_without_any_such_module_is_left_alone_and_that_is_said_once(kernels, fuse, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    values = torch.randn(3, 2)
    expected = model(values)
    made = fuse(model)
    made.fuse(torch.nn.Sequential(torch.nn.Linear(2, 2)))  # a reference model of the same job
    assert [record.message for record in caplog.records] == [
        "no module of Sequential has a structure with a fused kernel; it runs natively"
    ]
    torch.testing.assert_close(model(values), expected, rtol=0, atol=0)


def test_inside_a_compiled_block_the_native_modules_run(kernels, fuse):
    model = make("Llama")
    expected = step(model)
    made = fuse(model)
    assert made.counts["rms_norm"] == 5
    model.model.layers[0].compile(backend="eager")
    model.model.layers[1].compile(backend="eager")
    assert_same(step(model), expected)
    assert kernels.calls["gated"] == kernels.calls["rotate"] == 0  # all in blocks; the last norm is outside
    assert kernels.calls["norm"] == 2  # its check and itself


def test_removal_leaves_nothing(kernels, agreement):
    model = make("Qwen2")
    made = FusedModules(FUSED, agreement)
    made.fuse(model)
    step(model)
    assert kernels.calls["rotate"]
    made.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    before = dict(kernels.calls)
    step(model)
    assert kernels.calls == before


def test_a_second_model_of_the_family_is_fused_too_and_rotates_once(kernels, fuse):
    models = make("Qwen2"), make("Qwen2")
    for model in models:
        made = fuse(model)
    assert made.counts == {"rms_norm": 10, "gated_mlp": 4, "rotary": 1}


def test_gradient_checkpointing_counts_no_tensor_of_the_check(kernels, fuse):
    model = make("Llama")
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    fuse(model)
    assert_same(step(model), expected)


def test_lora_adapters_inside_an_mlp_still_act(kernels, fuse):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("Qwen2"), config)
    expected = step(model)
    made = fuse(model)
    assert made.counts["gated_mlp"] == 2
    assert_same(step(model), expected)


def test_bf16_is_within_its_own_rounding(kernels, fuse, agreement):
    model = make("Qwen3").bfloat16()
    expected = step(model)
    fuse(model)
    found = step(model)
    assert float((found[0].float() - expected[0].float()).norm() / expected[0].float().norm()) < 2e-2
    assert set(agreement.checks().values()) == {"same"}


def test_a_forward_that_somebody_replaced_stays(kernels, fuse, monkeypatch):
    model = make("Qwen2")
    layer = model.model.layers[0]
    mine = types.MethodType(lambda self, x: x, layer.mlp)
    layer.mlp.forward = mine
    source = transformers.models.qwen2.modeling_qwen2

    def replaced(self, hidden_states):
        return hidden_states

    monkeypatch.setattr(source.Qwen2RMSNorm, "forward", replaced)
    made = fuse(model)
    assert layer.mlp.forward is mine
    assert made.counts["rms_norm"] == 0
    assert made.counts["gated_mlp"] == 1


def test_what_liger_fused_stays_liger_s(kernels, fuse):
    class LigerRMSNorm(transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    LigerRMSNorm.__module__ = LigerRMSNorm.forward.__module__ = "liger_kernel.transformers.rms_norm"
    made = fuse(torch.nn.Sequential(LigerRMSNorm(8)))
    assert not made.counts


def test_a_copy_of_a_fused_model_computes_with_its_own_weights(kernels, fuse):
    model = make("Qwen2")
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(step(twin)[0].abs().max()) > 0


def test_a_kernel_that_cannot_be_built_leaves_the_model_native(kernels, fuse, monkeypatch, agreement):
    def broken(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels, "norm", broken)
    model = make("Qwen2")
    expected = step(model)
    fuse(model)
    assert_same(step(model), expected)
    assert agreement.checks()["rms_norm in Qwen2RMSNorm, float32"] == "RuntimeError: no such instruction"


def test_each_size_that_a_kernel_is_compiled_for_is_checked(kernels, fuse, monkeypatch, agreement):
    right, heads_size = kernels.norm, []

    def broken_for_heads(values, weight, *rest):
        if weight.shape[0] != SIZE["hidden_size"]:
            heads_size.append(weight.shape[0])
            raise RuntimeError("no such instruction")
        return right(values, weight, *rest)

    monkeypatch.setattr(kernels, "norm", broken_for_heads)
    model = make("Qwen3")
    expected = step(model)
    fuse(model)
    assert_same(step(model), expected)
    assert len(heads_size) == 1, "tried once, and native from then on"
    assert kernels.calls["norm"] > 0
    assert agreement.checks()["rms_norm in Qwen3RMSNorm, float32"] == "RuntimeError: no such instruction"


def test_a_kernel_that_cuts_the_gradient_is_not_used(kernels, fuse, monkeypatch, agreement):
    right = kernels.gated
    monkeypatch.setattr(kernels, "gated", lambda gate, up, *rest: right(gate.detach(), up, *rest))
    model = make("Qwen2")
    expected = step(model)
    fuse(model)
    assert_same(step(model), expected)
    assert "gradient" in agreement.checks()["gated_mlp in Qwen2MLP, float32"]


def test_without_a_device_everything_stays_native(kernels, fuse, monkeypatch):
    monkeypatch.setattr(fused_check, "NATIVE_DEVICES", ("cpu",))
    model = make("Qwen2")
    expected = step(model)
    fuse(model)
    found = step(model)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert not any(kernels.calls.values())


def test_an_engine_s_model_is_fused_when_verl_has_built_it(kernels):
    model = make("Qwen2")
    fused = Fused(Settings.of(fused=("gated_mlp",)))
    fused.start()
    try:
        events.engine_initialized.emit(events.Engine("fsdp", (model,)))
        step(model)
        told = fused.describe()
        assert told["found"] == told["replaced"] == {"gated_mlp": 2}
        assert fused.describe()["checks"] == {"gated_mlp in Qwen2MLP, float32": "same"}
    finally:
        fused.stop()
    assert fused.describe()["replaced"] == {}
