"""Which modules of tiny models of many families run on kernels: ``python families.py [FAMILY,...]``

Prints RESULT and JSON: family -> kind -> [how many ran on a kernel, how many there are].  The kernels' stand-ins run in
the kernels' places, so that this needs no accelerator; what is recognised and checked is the same.

What there is, is counted without the overlay: norms by their classes' names and their weights, MLPs by their names
and their linear layers, experts by their parameters of three dimensions, and rotary embeddings by the modules that call
a function with such a name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from attention.packed_models import (  # noqa: E402
    EXPERTS,
    FAMILIES,
    FIRST,
    IMAGE,
    LAST,
    LINEAR,
    ROPE,
    SMALL,
    SPECIAL,
    TEXT,
    TOWER,
    WITH_IMAGES,
    pictures,
)

from fused.stand_ins import StandIns  # noqa: E402

HEAD = {"head_dim": 16}
LATENT = FAMILIES["deepseek_v3"]
TEXTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": {},
    "ministral": HEAD,
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "granite": {},
    "qwen3": HEAD,
    "olmo3": {},
    "hunyuan_v1_dense": HEAD,
    "exaone4": HEAD,
    "qwen2_moe": FAMILIES["qwen2_moe"],
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "minimax_m2": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "hunyuan_v1_moe": {**HEAD, "num_experts": 4, "moe_topk": 2},
    "dots1": {**HEAD, **LATENT, "n_shared_experts": 1},
    "qwen3_next": FAMILIES["qwen3_next"],
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "gemma2": FAMILIES["gemma2"],
    "gemma3_text": FAMILIES["gemma3_text"],
    "gemma4_text": FAMILIES["gemma3_text"]
    | {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
    },
    "llama4_text": FAMILIES["llama4_text"],
    "phi3": {},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**HEAD, **LATENT, "n_shared_experts": 1},
    "glm4_moe_lite": LATENT,
    "deepseek_v2": LATENT | {"n_shared_experts": 1, "n_group": None, "topk_group": None, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": FAMILIES["gpt_oss"],
    "olmo2": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
    },
    "seed_oss": {**HEAD, "residual_dropout": 0.1, "attention_dropout": 0.0},
    "ernie4_5": HEAD,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    "lfm2": FAMILIES["lfm2"],
    "cohere2": {},
    "nemotron": {},
    "starcoder2": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **WITH_IMAGES,
    "qwen3_vl_moe": (
        {**HEAD, **EXPERTS, "rope_scaling": {**ROPE, "mrope_interleaved": True}},
        WITH_IMAGES["qwen3_vl"][1],
    ),
    "glm4v": (
        {"rope_scaling": ROPE},
        TOWER | SMALL | {"hidden_size": 64, "image_size": 56},
    ),
}
"""Vision-language family -> what its text model and its vision tower have of their own."""

KINDS = {"rms_norm": "norms", "gate": "MLPs", "rotary": "rotary"}
"""File of a kernel -> what of a model runs on it."""


def build(family: str) -> nn.Module:
    """Return a tiny model in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    if family in IMAGES:
        text, tower = IMAGES[family]
        config = type(AutoConfig.for_model(family))(text_config={**TEXT, **text}, vision_config=tower, **SPECIAL)
        make = AutoModelForImageTextToText
    else:
        config, make = AutoConfig.for_model(family, **{**TEXT, **TEXTS[family]}), AutoModelForCausalLM
    model: nn.Module = make.from_config(config, attn_implementation="eager", dtype=torch.bfloat16).bfloat16().train()
    for parameter in model.parameters():  # many begin at 0
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model


def loss(family: str, model: nn.Module) -> torch.Tensor:
    """Run the model on 16 tokens, an image among them where the family takes images."""
    ids = torch.arange(3, 19)[None]
    more: dict[str, torch.Tensor] = {}
    if family in IMAGES:
        ids[0, 2:8] = torch.tensor([FIRST, *[IMAGE] * 4, LAST])
        more = {**pictures(1), "position_ids": torch.arange(16).expand(3, 1, -1)}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits.float().square().mean()


class Trace:
    """Which module is at work, and which ones have run what."""

    def __init__(self) -> None:
        self.ran: dict[str, set[nn.Module]] = defaultdict(set)
        self._at_work: list[nn.Module] = []

    def follow(self, model: nn.Module) -> None:
        """Follow the calls of the modules that have weights; an activation that has a hook must run its own code."""
        for module in (each for each in model.modules() if any(True for _ in each.parameters())):
            module.register_forward_pre_hook(lambda module, inputs: self._at_work.append(module))
            module.register_forward_hook(lambda module, inputs, outputs: self._left())

    def _left(self) -> None:
        self._at_work.pop()

    def told(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, whose calls are told as what the module at work runs."""

        def run(*inputs: Any, **named: Any) -> Any:
            if self._at_work:
                self.ran[what].add(self._at_work[-1])
            return function(*inputs, **named)

        return run


@contextmanager
def rotations_told(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell each call of a function of the model's files that has a name of rotary embeddings."""
    replaced = []
    for name in {type(module).__module__ for module in model.modules()}:
        for key, value in list(vars(sys.modules[name]).items()):
            if type(value) is FunctionType and value.__module__ == name and ("rotary_" in key or "_rope" in key):
                setattr(sys.modules[name], key, trace.told("rotary", value))
                replaced.append((sys.modules[name], key, value))
    try:
        yield
    finally:
        for each in replaced:
            setattr(*each)


def there_are(model: nn.Module) -> dict[str, set[nn.Module]]:
    """Return the norms, MLPs and experts of the model."""
    found: dict[str, set[nn.Module]] = {"norms": set(), "MLPs": set(), "experts": set()}
    for module in model.modules():
        name = type(module).__name__
        linear = sum(isinstance(child, nn.Linear) for child in module.children())
        own = [parameter.dim() for parameter in module.parameters(recurse=False)]
        if "Norm" in name and own:
            found["norms"].add(module)
        elif "mlp" in name.lower() and linear > 1:
            found["MLPs"].add(module)
        elif 3 in own and not isinstance(module, nn.Conv1d):
            found["experts"].add(module)
    return found


def measured(family: str) -> dict[str, tuple[int, int]]:
    """Return kind -> how many modules of the family's tiny model ran on a kernel, and how many there are."""
    from verl_fl_overlay.kernels import agreement as checks
    from verl_fl_overlay.kernels.model import FusedModules
    from verl_fl_overlay.settings.variables import FUSED

    model, native, trace = build(family), Trace(), Trace()
    found = there_are(model)
    native.follow(model)
    with rotations_told(model, native), torch.no_grad():
        loss(family, model)
    found["rotary"] = native.ran["rotary"]
    checks.NATIVE_DEVICES = ()
    for name, module in StandIns().modules().items():
        kind = KINDS[name.rpartition(".")[2]]
        sys.modules[name] = SimpleNamespace(  # type: ignore[assignment]
            **{key: trace.told(kind, value) for key, value in vars(module).items()}
        )
    trace.follow(model)
    made = FusedModules(tuple(kind for kind in FUSED if kind != "adam"), checks.Agreement())
    made.fuse(model)
    try:
        loss(family, model)
        trace.ran.clear()  # the kernels that were called until now may be those of checks that failed
        loss(family, model).backward()
    finally:
        made.remove()
    ran = set().union(*trace.ran.values())
    return {kind: (len(modules & ran), len(modules)) for kind, modules in found.items()}


def main() -> None:
    import transformers

    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for family in sys.argv[1].split(",") if len(sys.argv) > 1 else (*TEXTS, *IMAGES):
        try:
            results[family] = measured(family)
        except Exception as error:  # what the model raises is the result
            results[family] = f"{type(error).__name__}: {error}"
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
