"""Attention over packed sequences where the engine has none."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.features.feature import Feature


class Attention(Feature):
    """Computes the attention that is asked for."""

    def start(self) -> None:
        """Answer from now on."""
        self.undo.callback(events.packed_attention.answer(self._attend))

    def _attend(self, query: Any, key: Any, value: Any, sequences: Any, form: Any, sinks: Any) -> Any:
        from verl_fl_overlay.kernels.attention_torch import attend  # it imports torch

        return attend(query, key, value, sequences, form, sinks)
