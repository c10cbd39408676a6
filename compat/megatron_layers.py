"""Megatron without TransformerEngine: mbridge asks for TransformerEngine's layers, whatever is installed."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

from verl_fl_overlay.errors import MegatronError
from verl_fl_overlay.hooks import Call, Hook

logger = logging.getLogger("verl_fl_overlay")

MEGATRON = "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core"
MBRIDGE = "https://github.com/ISEEKYAN/mbridge/blob/main/mbridge/core"

BEFORE = {".input_layernorm.": ".self_attention.linear_qkv.", ".pre_mlp_layernorm.": ".mlp.linear_fc1."}
"""A norm -> the linear layer after it; TransformerEngine has both in one module."""


def _transformer_engine() -> bool:
    """Return whether megatron-core found TransformerEngine; True for one that no longer says."""
    from megatron.core.models.gpt import gpt_layer_specs

    return bool(getattr(gpt_layer_specs, "HAVE_TE", True))


def _layers(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    if _transformer_engine() or not given.arguments.get("use_transformer_engine"):
        return wrapped(*args, **kwargs)
    config = given.arguments["config"]
    _refuse(config)
    if getattr(config, "num_moe_experts", None):
        _experts_of_its_own(config)
    given.arguments["use_transformer_engine"] = False
    given.arguments["normalization"] = given.arguments.get("normalization") or config.normalization
    logger.warning("TransformerEngine is not installed: Megatron's models have megatron-core's own layers")
    layers = wrapped(*given.args, **given.kwargs)
    if config.normalization == "RMSNorm":  # Megatron takes apex' layer norm for the last norm where apex is installed
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        layers.layer_norm = WrappedTorchNorm
    return layers


def _refuse(config: Any) -> None:
    """Raise if a model needs what megatron-core's own layers, or mbridge's names of their weights, do not have."""
    experts_apart = config.expert_tensor_parallel_size not in (None, config.tensor_model_parallel_size)
    found = {
        f"context_parallel_size={config.context_parallel_size}": config.context_parallel_size > 1,
        "experts split over other ranks than the rest": getattr(config, "num_moe_experts", None) and experts_apart,
        "multi-latent attention": getattr(config, "multi_latent_attention", False),
        "fp8": getattr(config, "fp8", None),
    }
    needing = [name for name, here in found.items() if here]
    if needing:
        way_on = "set context_parallel_size=1 or " if config.context_parallel_size > 1 else ""
        raise MegatronError(
            f"the model has {', '.join(needing)}, and megatron-core's own layers, which take TransformerEngine's "
            f"place where it is not installed, cannot compute that: {way_on}install TransformerEngine"
        )


def _experts_of_its_own(config: Any) -> None:
    """Have a layer's experts computed one after the other, by Megatron's own linear layers.

    Its grouped product of matrices needs the package grouped_gemm, and mbridge does not know the weights' names there.
    Its router looks whether a name is None, which it imports with TransformerEngine only; without it that is an error.
    """
    from megatron.core.transformer.moe import moe_utils

    config.moe_grouped_gemm = False
    vars(moe_utils).setdefault("te_general_gemm", None)


def _norm(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    config = given.arguments["config"]
    given.arguments["config"] = accepted = copy.copy(config)
    accepted.sequence_parallel = accepted.persist_layer_norm = accepted.memory_efficient_layer_norm = False
    norm = wrapped(*given.args, **given.kwargs)
    for weight in norm.parameters():
        weight.sequence_parallel = config.sequence_parallel  # by which Megatron adds up its gradients
    return norm


def _weight_names(wrapped: Call, bridge: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = wrapped(*args, **kwargs)
    if _transformer_engine():
        return names
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    given.apply_defaults()
    first = 0
    if given.arguments["consider_ep"] and bridge.mpu.ep_size > 1:
        first = bridge.mpu.ep_rank * (bridge.config.num_moe_experts // bridge.mpu.ep_size)
    return {name: as_fused(known, names, first) for name, known in names.items()}


def as_fused(name: str, names: dict[str, str], first: int = 0) -> str:
    """Return the name that the weight of a norm or an expert has in TransformerEngine's layers, any other ``name``.

    ``first`` is the number of this rank's first expert.
    """
    layer, found, expert = name.partition(".experts.local_experts.")
    if found:
        number, _, leaf = expert.partition(".")
        return f"{layer}.experts.{leaf}{int(number) + first}"
    for norm, linear in BEFORE.items():
        layer, found, leaf = name.partition(norm)
        if found and f"{layer}{linear}weight" in names.values():
            return f"{layer}{linear}layer_norm_{leaf}"
    return name


def own_layers_hooks() -> list[Hook]:
    """Return what a model of megatron-core's own layers needs."""
    return [
        Hook(
            name="megatron.layers",
            module="megatron.core.models.gpt.gpt_layer_specs",
            attribute="get_gpt_decoder_block_spec",
            wrapper=_layers,
            feature="megatron",
            required=False,
            why="mbridge and verl ask for TransformerEngine's layers whether or not it is installed; without it the "
            "model gets megatron-core's own.",
            upstream=f"{MBRIDGE}/llm_bridge.py#L149",
            until="mbridge asks for the layers that are there",
            needs="megatron.core",
        ),
        Hook(
            name="megatron.norm",
            module="megatron.core.transformer.torch_norm",
            attribute="WrappedTorchNorm.__new__",
            wrapper=_norm,
            feature="megatron",
            required=False,
            why="Megatron refuses torch's norms where sequence parallelism is on, as verl has it under tensor "
            "parallelism; they are built, and their weights marked, so that Megatron adds up their gradients.",
            upstream=f"{MEGATRON}/transformer/torch_norm.py#L33",
            until="megatron-core marks the weights of torch's norms itself",
            needs="megatron.core",
        ),
        Hook(
            name="megatron.weight_names",
            module="mbridge.core.bridge",
            attribute="Bridge._weight_name_mapping_mcore_local_to_global",
            wrapper=_weight_names,
            feature="megatron",
            required=False,
            why="mbridge knows the weights of TransformerEngine's layers only, where a norm is part of the linear "
            "layer after it, and a layer's experts are one module; the norms and experts of megatron-core's own layers "
            "get those names, to be loaded and exported.",
            upstream=f"{MBRIDGE}/bridge.py",
            until="mbridge knows the names in megatron-core's own layers",
            needs="mbridge",
        ),
    ]
