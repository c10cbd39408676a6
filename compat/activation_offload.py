"""verl's offload of activations (enable_activation_offload): it takes a tensor for another one in the same memory."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.hooks import Call, Hook


def _key(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    (tensor,) = args
    laid_out = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return (*wrapped(tensor), laid_out)


def key_hook() -> Hook:
    """Return the hook on the key under which a copy of a tensor is kept."""
    return Hook(
        name="activations.key",
        module="verl.utils.activation_offload",
        attribute="_get_unique_tensor_key",
        wrapper=_key,
        feature="activations",
        required=False,
        why="Tensors that begin at one place share one copy, whatever their strides, so that a layer without gradient "
        "checkpointing gets a transposed one back wrong; the strides become part of the key.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/activation_offload.py#L34",
        until="verl's key tells tensors of other shapes and strides apart",
    )
