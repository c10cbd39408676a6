"""Fused kernels: what each replaces, the check that its numbers are the same, and how it gets into a model.

One file holds one kind of kernel.  ``model`` puts the kinds into a model, ``agreement`` checks them, and ``state`` says
what a module's numbers depend on beside its inputs and weights.
"""
