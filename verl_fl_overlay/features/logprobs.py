"""Log-probs."""

from __future__ import annotations

import sys
from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.features.feature import Feature


class Logprobs(Feature):
    """Log-probs."""

    def start(self) -> None:
        """Start."""
        self.undo.callback(events.token_logprobs.answer(_token_logprobs))

    def describe(self) -> dict[str, Any]:
        """Describe."""
        logprobs = sys.modules.get("verl_fl_overlay.kernels.logprobs")
        return {"kernels": logprobs.kernels_used() if logprobs else {}}


def _token_logprobs(logits: Any, labels: Any, in_place: bool) -> Any:
    import torch

    if type(logits) is not torch.Tensor:
        return None
    from verl_fl_overlay.kernels.logprobs import token_logprobs

    return token_logprobs(logits, labels, in_place=in_place)
