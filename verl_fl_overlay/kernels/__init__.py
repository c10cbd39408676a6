"""Fused kernels, each checked against what it replaces before it is used."""
