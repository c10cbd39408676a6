"""verl's real Megatron engine on GPUs, or its FSDP2 engine, trained for some steps; prints JSON, floats as hexadecimal.

``python tests/gpu/megatron_engine.py MODEL --head lm --steps 8``, or under torchrun with ``--engine
'{"tensor_model_parallel_size": 2}'``.  Where TransformerEngine is not installed, megatron-core's own layers take its
place.  Without the overlay this program sees to that: mbridge asks for TransformerEngine's unconditionally, and maps
Hugging Face names to its fused parameters only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import real_engine


def te_fl() -> bool:
    """Return whether the overlay is here and gives TransformerEngine-FL what it lacks for verl's defaults."""
    if "verl_fl_overlay" not in sys.modules:  # to import it is to load the overlay
        return False
    from verl_fl_overlay.packages import flagos_builds

    return flagos_builds()["TransformerEngine-FL"]


def use_local_layers() -> None:
    """Have mbridge build megatron-core's own layers, know the names of their norms, and mask as verl expects."""
    import torch
    from mbridge.core.llm_bridge import LLMBridge
    from mbridge.models.qwen2 import Qwen2Bridge
    from mbridge.models.qwen2moe import Qwen2MoEBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils

    def local(bridge: Any, vp_stage: int | None = None) -> Any:
        bridge.config.moe_grouped_gemm = False
        return get_gpt_decoder_block_spec(
            bridge.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )

    if DotProductAttention.forward.__name__ == "masked":
        return  # for an earlier engine of this process
    forward = DotProductAttention.forward

    def masked(core: Any, *tensors: Any, packed_seq_params: Any = None, **options: Any) -> Any:
        """Mask as TransformerEngine does: verl gives [rows, length], True where there is a token; or, for sequences
        packed one after the other, queries, keys and values that are [tokens, heads, width], and where each ends."""
        *qkv, mask = tensors
        device, length = qkv[0].device, len(qkv[0])
        apart = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        if packed_seq_params is None:
            return forward(core, *qkv, ~mask.bool()[:, None, None, :] | apart, **options)
        row = torch.bucketize(torch.arange(length, device=device), packed_seq_params.cu_seqlens_q[1:], right=True)
        apart = apart | (row[:, None] != row)
        return forward(core, *(tensor[:, None] for tensor in qkv), apart[None, None], **options)

    names = Qwen2MoEBridge._weight_name_mapping_mlp

    def numbered(bridge: Any, name: str) -> Any:
        """Give an expert of this rank its number among all of them."""
        layer, found, expert = name.partition(".local_experts.")
        if not found:
            return names(bridge, name)
        number, _, weight = expert.partition(".")
        first = bridge.mpu.ep_rank * (bridge.config.num_moe_experts // bridge.mpu.ep_size)
        return names(bridge, f"{layer}.{weight}{first + int(number)}")

    vars(moe_utils).setdefault("te_general_gemm", None)  # its router asks for it without TransformerEngine too
    DotProductAttention.forward = masked
    Qwen2MoEBridge._weight_name_mapping_mlp = numbered
    LLMBridge._get_transformer_layer_spec = local
    # mbridge looks "pre_mlp_..." up among the MLP's names, and what is neither attention nor MLP among the others.
    Qwen2Bridge._MLP_MAPPING["pre_mlp_layernorm.weight"] = [
        "model.layers.{layer_number}.post_attention_layernorm.weight"
    ]
    for bridge in (Qwen2Bridge, Qwen2MoEBridge):
        bridge._OTHER_MAPPING = {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]}


def verls_defaults() -> dict[str, Any]:
    """Return what verl's own configuration file overrides of Megatron's."""
    import verl
    from omegaconf import OmegaConf

    file = Path(verl.__file__).parent / "trainer" / "config" / "engine" / "megatron.yaml"
    return dict(OmegaConf.to_container(OmegaConf.load(file).override_transformer_config))


def configs(model: str, head: str, engine: dict[str, Any], transformer: dict[str, Any]) -> dict[str, Any]:
    """Return the four configurations a Megatron engine is constructed from: verl's defaults, but for what is given."""
    from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig

    common = real_engine.configs(model, "fsdp2", head)
    if head == "value":  # by which verl 0.7's engine knows it
        common["model_config"].architectures = ["Qwen2ForTokenClassification"]
    return {
        **common,
        "engine_config": McoreEngineConfig(
            vanilla_mbridge=True,  # Megatron-Bridge, newer releases' default, imports TransformerEngine
            override_transformer_config={**verls_defaults(), **transformer},
            **{"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, **engine},
        ),
        "optimizer_config": McoreOptimizerConfig(
            lr={"lm": 1e-3, "value": 1e-4}[head],
            weight_decay=0.0,
            total_training_steps=100,
            lr_warmup_steps=0,
            lr_warmup_steps_ratio=0.0,
            lr_decay_style="constant",  # as FSDP's optimizer has it by default
        ),
    }


def make_engine(
    model: str,
    head: str = "lm",
    engine: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    *,
    float32: bool = False,
    lr: float | None = None,
    local: bool | None = None,
) -> Any:
    """Return verl's Megatron engine, initialised; in ``float32``, with a constant ``lr`` of its own.

    ``local``: this program, not the overlay, sees to it that megatron-core's own layers are built; by default where
    neither TransformerEngine nor the overlay is there.
    """
    from verl.workers.engine import EngineRegistry

    engine, transformer = dict(engine or {}), dict(transformer or {})
    if local is None:
        local = not find_spec("transformer_engine") and "verl_fl_overlay" not in sys.modules
    if te_fl():
        pass
    elif find_spec("transformer_engine"):  # without flash-attn it has no attention over packed sequences
        engine, transformer = {"use_remove_padding": False, **engine}, {"attention_backend": "unfused", **transformer}
    elif local:
        use_local_layers()
        # mbridge turns on what torch's norms do not know, and apex' softmax
        transformer |= dict.fromkeys(("sequence_parallel", "persist_layer_norm", "masked_softmax_fusion"), False)
    arguments = configs(model, head, engine, transformer)
    if lr is not None:
        object.__setattr__(arguments["optimizer_config"], "lr", lr)
    if float32:  # which the configuration refuses, and Megatron does not
        object.__setattr__(arguments["engine_config"], "dtype", "float32")
    made = EngineRegistry.new(model_type=arguments["model_config"].model_type, backend="megatron", **arguments)
    made.initialize()
    return made


def seed_everything() -> None:
    """Give torch and Megatron's tensor-parallel generators a seed."""
    import torch

    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def kernels(engine: Any, head: str) -> dict[str, list[str]]:
    """Return the names of the GPU kernels of one more step, and of arithmetic where verl does not train."""
    from flaggems_routing import kernels_of, outside

    return {
        "step": sorted(kernels_of(lambda: real_engine.train(engine, head, 1))),
        "outside": sorted(kernels_of(outside)),
    }


def sums_of_weights(engine: Any) -> dict[str, str]:
    """Return name -> sum of absolute values, of all weights that verl gives to rollout."""
    parameters = engine.get_per_tensor_param()
    return {
        name: float(weight.double().abs().sum()).hex()
        for name, weight in (parameters[0] if isinstance(parameters, tuple) else parameters)
    }


def phase_inside(engine: Any) -> list[bool]:
    """Return a list that gets one entry a forward pass: whether the training phase was on in it."""
    seen: list[bool] = []
    if "verl_fl_overlay.phase" in sys.modules:
        from verl_fl_overlay.phase import training

        modules = engine.module if isinstance(engine.module, list) else [engine.module]
        for module in modules:
            module.register_forward_pre_hook(lambda *_: seen.append(training.active))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--strategy", default="megatron")
    parser.add_argument("--head", default="lm", choices=["lm", "value"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engine", type=json.loads, default={}, help="fields of the engine's configuration, as JSON")
    parser.add_argument("--transformer", type=json.loads, default={}, help="override_transformer_config, as JSON")
    parser.add_argument("--float32", action="store_true", help="for numbers that can be compared")
    parser.add_argument("--packed", action="store_true", help="of FSDP's engines; Megatron's packs by itself")
    parser.add_argument("--export", action="store_true", help="tell the sums of the weights that rollout would get")
    parser.add_argument("--without", help="a package that is not to be there")
    parser.add_argument("--kernels", action="store_true", help="tell which GPU kernels ran inside and outside a step")
    options = parser.parse_args()
    if options.without:
        sys.modules[options.without] = None  # by which Python says that it is not installed

    import torch
    import verl  # noqa: F401
    from verl.utils.distributed import initialize_global_process_group

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(real_engine.free_port()))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    seed_everything()
    initialize_global_process_group()
    if options.strategy == "megatron":
        more = {"engine": options.engine, "transformer": options.transformer, "float32": options.float32}
        engine = make_engine(options.model, options.head, **more)
    else:
        packed = {"packed": options.packed, **options.engine}
        engine = real_engine.make_engine(options.model, options.strategy, options.head, **packed)
    if options.kernels:
        from flaggems_routing import one_tiling_for_mm

        one_tiling_for_mm()
    exported = sums_of_weights(engine) if options.export else None
    seen = phase_inside(engine)
    steps = real_engine.train(engine, options.head, options.steps, options.packed)
    inside = {"train": seen[:]}
    values = real_engine.infer(engine, options.head, options.packed)
    inside["infer"] = seen[len(inside["train"]) :]
    launched = kernels(engine, options.head) if options.kernels else None
    after = None
    report = None
    if "verl_fl_overlay.phase" in sys.modules:
        from verl_fl_overlay.activation import report as build
        from verl_fl_overlay.phase import training

        after, report = training.active, build()
    if engine.is_mp_src_rank_with_outputs() and engine.get_data_parallel_rank() == 0:
        result = {
            "steps": [{name: value.hex() for name, value in step.items()} for step in steps],
            "values": [value.hex() for value in values],
            "inside": inside,
            "kernels": launched,
            "exported": exported,
            "after": after,
            "report": report,
        }
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
