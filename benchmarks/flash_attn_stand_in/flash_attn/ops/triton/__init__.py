"""A folder of flash-attn."""
