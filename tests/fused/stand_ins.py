"""FlagGems' three fused kernels, by its signatures, in plain torch: for the CPU, on which FlagGems has none."""

from __future__ import annotations

import torch


class StandIns:
    def __init__(self):
        self.calls = {"rms_norm": 0, "silu_and_mul": 0, "rotate": 0}

    def rms_norm(self, x, normalized_shape, weight, eps):
        self.calls["rms_norm"] += 1
        values = x.float()
        return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    def silu_and_mul(self, gate, up):
        self.calls["silu_and_mul"] += 1
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    def rotate(self, q, k, cos, sin):
        """q, k: (batch, length, heads, size); cos, sin: (length, size // 2)."""
        self.calls["rotate"] += 1
        assert q.is_contiguous()
        assert cos.shape == (q.shape[1], q.shape[-1] // 2)

        def turn(heads):
            first, second = heads.float().chunk(2, -1)
            c, s = cos.float()[None, :, None], sin.float()[None, :, None]
            return torch.cat([first * c - second * s, second * c + first * s], -1).to(heads.dtype)

        return turn(q), turn(k)
