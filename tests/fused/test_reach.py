"""Which norms, MLPs and experts of the families that people train run on the kernels, equal in value and gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from attention.packed_models import EXPERTS, FAMILIES, TEXT  # noqa: E402

MORE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "glm4": {"head_dim": 16},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["attention"] * 4,
        "shared_intermediate_size": 64,
    },
    "seed_oss": {"head_dim": 16},
    "cohere2": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
}
RUNNING = {
    "qwen3_moe": {"rms_norm": 17, "experts": 4},
    "qwen2_moe": {"rms_norm": 9, "gated_mlp": 4, "experts": 4},
    "mixtral": {"rms_norm": 9, "experts": 4},
    "deepseek_v3": {"rms_norm": 17, "gated_mlp": 4, "experts": 3},
    "glm4_moe": {"rms_norm": 9, "gated_mlp": 4, "experts": 3},
    "phimoe": {"experts": 4},
    "gpt_oss": {"rms_norm": 9},
    "gemma2": {"rms_norm": 17, "gated_mlp": 4},
    "gemma3_text": {"rms_norm": 25, "gated_mlp": 4},
    "gemma4_text": {"rms_norm": 34, "gated_mlp": 4},
    "qwen3_next": {"rms_norm": 13, "gated_mlp": 4, "experts": 4},
    "qwen3_5_text": {"rms_norm": 13, "gated_mlp": 4},
    "llama4_text": {"rms_norm": 12, "gated_mlp": 4},
    "phi3": {"rms_norm": 9, "gated_mlp": 4},
    "glm4": {"rms_norm": 17, "gated_mlp": 4},
    "granitemoehybrid": {"rms_norm": 9, "gated_mlp": 4},
    "seed_oss": {"rms_norm": 9, "gated_mlp": 4},
    "lfm2": {"rms_norm": 13, "gated_mlp": 4},
    "cohere2": {"rms_norm": 5, "gated_mlp": 4},
    "olmo2": {"rms_norm": 17, "gated_mlp": 4},
}
"""Family -> how many of a model of four layers run fused: with transformers 5, whose experts are 3-D parameters."""


def make(family):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = transformers.AutoConfig.for_model(family, **{**TEXT, **FAMILIES.get(family, {}), **MORE.get(family, {})})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights of 1 and of 0 would hide a kernel that forgets them
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def step(model):
    model.zero_grad()
    logits = model(input_ids=torch.arange(3, 21).view(2, 9), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", RUNNING)
def test_what_runs_fused_computes_what_the_model_does(family, kernels, fuse):
    model = make(family)
    (logits, gradients), names = step(model), list(model.state_dict())
    made = fuse(model, ("rms_norm", "gated_mlp", "experts"))
    found, found_gradients = step(model)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((found_gradients[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-7, name
    assert list(model.state_dict()) == names
    expected = RUNNING[family]
    if int(transformers.__version__.partition(".")[0]) < 5:  # experts are gated MLPs, or do all in one forward
        assert {"experts", *made.running} >= {*expected}
        assert made.running["rms_norm"] == expected.get("rms_norm", 0)
    else:
        assert made.running == expected
