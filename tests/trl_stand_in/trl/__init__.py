"""A stand-in for trl where verl looks for it: a causal model with a value head, its place until 0.28."""

from __future__ import annotations

from typing import Any

from torch import nn


class ValueHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.summary = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Any) -> Any:
        return self.summary(hidden.to(self.summary.weight.dtype))


class AutoModelForCausalLMWithValueHead(nn.Module):
    """Gives (logits, loss, values [batch, tokens]) of a model; it has no configuration of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.gradient_checkpointing_enable = model.gradient_checkpointing_enable
        self.v_head = ValueHead(model.config)

    @classmethod
    def from_pretrained(cls, model: Any) -> AutoModelForCausalLMWithValueHead:
        return cls(model)

    def forward(self, **inputs: Any) -> tuple[Any, Any, Any]:
        output = self.pretrained_model(**inputs, output_hidden_states=True)
        return output.logits, output.loss, self.v_head(output.hidden_states[-1]).squeeze(-1)
