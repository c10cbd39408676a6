"""The kernels in Triton.  This file imports no Triton, so what it says is known where there is none."""

LARGEST_HEAD = 256
"""The largest head size that ``attention`` takes."""
