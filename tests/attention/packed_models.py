"""Tiny models of many families on packed sequences, and each sequence alone: ``python packed_models.py FAMILY,...``

Prints RESULT and JSON: family -> what the trial of packing says, whether the model is given lengths, and how far logits
and gradients of the packed batch are from those of the sequences alone, which are computed by eager attention.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {
        "head_dim": 16,
        "attention_dropout": 0.1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "pegasus": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 32},
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "llama4_text": {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
}
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "in_channels": 3}
WITH_IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({"rope_scaling": ROPE}, TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": ({"rope_scaling": ROPE}, TOWER | SMALL | {"window_size": 56, "fullatt_block_indexes": [1]}),
    "qwen3_vl": (
        {"head_dim": 16, "rope_scaling": {**ROPE, "mrope_interleaved": True}},
        TOWER | SMALL | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
}
"""Vision-language family -> what its text model and its vision tower have of their own."""

IMAGE, VIDEO, FIRST, LAST = 100, 101, 102, 103
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": FIRST,
    "vision_end_token_id": LAST,
}
LENGTHS = (7, 1, 13, 9)


def build(family: str, attention: str) -> Any:
    """Return a model in fp32, the same at each call but for its attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if family in WITH_IMAGES:
        text, tower = WITH_IMAGES[family]
        kind = type(AutoConfig.for_model(family))
        config = kind(text_config={**TEXT, **text}, vision_config=tower, **SPECIAL)
        make = AutoModelForImageTextToText
    else:
        config, make = AutoConfig.for_model(family, **{**TEXT, **FAMILIES[family]}), AutoModelForCausalLM
    torch.manual_seed(0)
    model = make.from_config(config, attn_implementation=attention, dtype=torch.float32).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # as large as training makes them; many begin at 0
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def sequences(images: bool) -> list[torch.Tensor]:
    """Return token ids; with ``images`` the longer ones hold an image of 4 tokens."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(3, 99, (length,), generator=generator) for length in LENGTHS]
    image = torch.tensor([FIRST, *[IMAGE] * 4, LAST])
    return [torch.cat([ids[:2], image, ids[2:]]) if images and len(ids) > 8 else ids for ids in drawn]


def pictures(count: int) -> dict[str, torch.Tensor]:
    """Return the inputs for ``count`` images of 4 x 4 patches, nothing for none."""
    if not count:
        return {}
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(6))
    return {"pixel_values": pixels.repeat(count, 1), "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(count, 1)}


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def packed(family: str, attention: str, images: bool, first: int) -> dict[str, Any]:
    """Run the packed batch as verl's engine does, and each sequence alone; positions begin at ``first``."""
    from verl.models.transformers.monkey_patch import apply_monkey_patch

    from verl_fl_overlay.compat.packing import Place
    from verl_fl_overlay.errors import PackingError

    rows = (4, 1) if family in WITH_IMAGES else (1,)
    tokens = sequences(images)
    reference, alone = build(family, "eager"), []
    for ids in tokens:
        positions = (first + torch.arange(len(ids))).expand(*rows, -1)
        image = pictures(int(IMAGE in ids and images))
        alone.append(reference(input_ids=ids[None], position_ids=positions, use_cache=False, **image).logits)
    expected = torch.cat(alone, dim=1)
    expected.square().sum().backward()

    model = build(family, attention)
    apply_monkey_patch(model, use_remove_padding=True)
    place = Place(model, 1, 0, nullcontext)
    model.train()  # as in a step: dropout must not hide a leak
    positions = torch.cat([first + torch.arange(len(ids)) for ids in tokens]).expand(*rows, -1)
    refused = ""
    try:
        place.try_on({"position_ids": positions})
    except PackingError as error:
        refused = str(error)
    assert all(module.training for module in model.modules())
    model.eval()
    ends = torch.tensor([0, *accumulate(map(len, tokens))], dtype=torch.int32)
    lengths = place.lengths(ends, max(map(len, tokens)))
    image = pictures(sum(IMAGE in ids for ids in tokens) if images else 0)
    given = {"input_ids": torch.cat(tokens)[None], "position_ids": positions, "attention_mask": None}
    found = model(**given, **lengths, **image, use_cache=False).logits
    found.square().sum().backward()
    one, other = gradients(model), gradients(reference)
    return {
        "refused": refused,
        "lengths": sorted(lengths),
        "logits": float((found - expected).abs().max()),
        "gradients": float((one - other).norm() / other.norm()),
    }


def tried_with_verls_fused_head(family: str, attention: str) -> dict[str, Any]:
    """Return what the trial says where verl's fused head gives log-probs and no logits."""
    import inspect

    from verl.models.transformers.monkey_patch import apply_monkey_patch

    from verl_fl_overlay.compat.packing import Place
    from verl_fl_overlay.errors import PackingError

    model = build(family, attention)
    apply_monkey_patch(model, use_remove_padding=True, use_fused_kernels=True, fused_kernels_backend="torch")
    inputs = {"position_ids": torch.zeros(1, 1, dtype=torch.long), "temperature": 1.0}
    if "shift_labels" in inspect.signature(model.forward).parameters:
        inputs["shift_labels"] = torch.zeros(1, 1, dtype=torch.long)
    try:
        Place(model, 1, 0, nullcontext).try_on(inputs)
    except PackingError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def main() -> None:
    import verl  # noqa: F401

    from verl_fl_overlay.activation import report

    torch.set_num_threads(1)
    results = {}
    for case in sys.argv[1].split(","):
        family, attention, *more = case.split("/")
        try:
            if more == ["fused head"]:  # after all others: verl replaces the forward of the class
                results[case] = tried_with_verls_fused_head(family, attention)
                continue
            results[case] = packed(family, attention, "images" in more, 3 if "later positions" in more else 0)
        except Exception as error:  # what the model or verl raises is the result
            results[case] = {"error": f"{type(error).__name__}: {error}"}
    results["report"] = report()
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
