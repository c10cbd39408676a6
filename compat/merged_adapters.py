"""LoRA adapters that verl merges into the weights for rollout (model.lora.merge=True), before verl 0.9."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.hooks import Call, Hook

MERGED = ".base_layer."
"""Part of a weight's name in PEFT's model if adapters are merged into it."""


def _names(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (params,) = (*args, *kwargs.values())
    return wrapped({name: tensor.clone() if MERGED in name else tensor for name, tensor in params.items()})


def weights_hook() -> Hook:
    """Return the hook on the names of the merged weights, which verl asks for while they are merged.

    It copies those weights of this rank's shard, on the device where they are.
    """
    return Hook(
        name="engine.merged_adapters",
        module="verl.workers.engine.fsdp.transformer_impl",
        attribute="normalize_peft_param_name",
        wrapper=_names,
        feature="phase",
        required=True,
        why="verl takes merged weights without a copy, and takes the adapters out again before it sends them: rollout "
        "gets the weights from before training.  A copy keeps what was merged.",
        upstream="https://github.com/volcengine/verl/blob/v0.8.0/verl/workers/engine/fsdp/transformer_impl.py#L820",
        until="verl 0.9.0, which sends the weights while they are merged",
    )
