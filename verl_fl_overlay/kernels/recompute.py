"""The layers of a model that recompute their activations in the backward pass, and the switch that stops this.

A layer that recomputes runs its forward twice: a quarter of the matmuls of a training step.  A layer that keeps its
activations runs once, as if there were no checkpointing: nothing is wrapped around it and nothing more is launched.
The gradients are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

KEEPS = 0
"""The value of a layer's ``gradient_checkpointing`` if the overlay has turned it off.

transformers takes it for False.  It writes False and True itself, so the type tells whose choice a value is.
"""


class Layers:
    """The layers of ``model`` that recompute, in the order of the model, by structure.

    Such a layer is one that transformers checkpoints (it has ``gradient_checkpointing`` and the function that
    checkpoints, and its class does this in ``__call__``), or torch's ``CheckpointWrapper`` around a layer.  A model
    that checkpoints all its layers in its own forward, as older ones do, counts as one layer.
    """

    def __init__(self, model: Any) -> None:
        # Under FSDP a layer leads to the whole model, and a model that verl has dropped is not kept.
        self._all = [weakref.ref(module) for module in model.modules() if _wraps(module) or _recomputes(module)]
        self.kept = 0
        """How many of them keep their activations; they are the last ones of the model.

        The backward pass begins with the last layers.  So what they keep is free again when it comes to a layer that
        recomputes, which needs room for its own activations then.
        """

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Any:
        """Return a layer, the first one being 0; None if its model is gone."""
        return self._all[index]()

    def keep(self, count: int) -> None:
        """Let the last ``count`` layers keep their activations from the next forward on, and the others recompute."""
        if count == self.kept:
            return
        for index in range(len(self)):
            if (layer := self[index]) is not None:
                _switch(layer, keeps=index >= len(self) - count)
        self.kept = count


class _Keeping:
    """Stands in for the function that checkpoints in a ``CheckpointWrapper``: it only calls what it is given."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def _wraps(module: Any) -> bool:
    return "checkpoint_fn" in vars(module) and hasattr(module, "_checkpoint_wrapped_module")


def _recomputes(module: Any) -> bool:
    if not _is_on(module):
        return False
    by_itself = type(module).__call__ is not nn.Module.__call__
    return by_itself or not any(_is_on(part) for part in module.modules() if part is not module)


def _is_on(module: Any) -> bool:
    own = vars(module)  # a CheckpointWrapper answers for the layer in it
    return own.get("gradient_checkpointing") is True and callable(own.get("_gradient_checkpointing_func"))


def _switch(layer: Any, *, keeps: bool) -> None:
    """Change a layer unless it is so already, or others have changed it since."""
    if not _wraps(layer):
        value = layer.gradient_checkpointing
        if value is True and keeps:
            layer.gradient_checkpointing = KEEPS
        elif type(value) is int and not keeps:
            layer.gradient_checkpointing = True
    elif keeps and not isinstance(layer.checkpoint_fn, _Keeping):
        layer.checkpoint_fn = _Keeping(layer.checkpoint_fn)
    elif not keeps and isinstance(layer.checkpoint_fn, _Keeping):
        layer.checkpoint_fn = layer.checkpoint_fn.checkpoint
