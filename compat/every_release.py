"""The hooks that every release of verl needs."""

from __future__ import annotations

from collections.abc import Iterable

from verl_fl_overlay.compat import (
    activation_offload,
    adapters,
    engines,
    flash_attn,
    megatron_attention,
    megatron_layers,
    micro_batch,
    model_outputs,
    packing,
    process_group,
    ray_env,
    rollout,
    te_fl,
    token_logprobs,
    transformers_attention,
)
from verl_fl_overlay.compat import without_accelerator as cpu
from verl_fl_overlay.hooks import Hook

CONSUMERS = ("fsdp", "torchtitan", "automodel", "prefix_grouper")
"""The callers that ask for log-probs, from 0.8.0 on."""


def hooks(initialize: Iterable[Hook] | None = None, consumers: Iterable[str] = CONSUMERS) -> list[Hook]:
    """Return the hooks; ``initialize`` are those on a release's backends (default: all), ``consumers`` its callers."""
    return [
        *engines.base_hooks(),
        *(map(engines.initialize_hook, engines.BACKENDS) if initialize is None else initialize),
        flash_attn.value_model_hook(),
        *transformers_attention.hooks(),
        *packing.engine_hooks(),
        *packing.model_hooks(),
        adapters.adapters_hook(),
        adapters.layered_hook(),
        micro_batch.engine_hook(),
        activation_offload.key_hook(),
        megatron_attention.packed_hook(),
        *megatron_layers.own_layers_hooks(),
        *te_fl.hooks(),
        *token_logprobs.hooks(consumers),
        model_outputs.inputs_hook(),
        *(model_outputs.outputs_hook(name) for name in consumers if name in model_outputs.ENGINES),
        *ray_env.ray_hooks(),
        *rollout.plugin_hooks(),
        rollout.engine_hook(),
        *process_group.flagcx_hooks(),
        *cpu.shared_hooks(),
    ]
