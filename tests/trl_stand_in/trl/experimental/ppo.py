"""The place of trl's value head from 0.29 on."""

from trl import AutoModelForCausalLMWithValueHead

__all__ = ["AutoModelForCausalLMWithValueHead"]
