"""The fused kernels in plain torch: for the CPU, on which there are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from verl_fl_overlay.kernels import gate_torch, norm_torch


class StandIns:
    """The kernels, how often each was called, and which variant of a kernel was the last one."""

    def __init__(self):
        self.variant = None
        self.calls = {"norm": 0, "gated": 0, "gated_halves": 0, "rotate": 0}

    def modules(self) -> dict[str, Any]:
        """Return what takes the place of the modules with the kernels in ``sys.modules``."""
        return {
            f"verl_fl_overlay.kernels.triton.{file}": SimpleNamespace(
                **{name: lambda *inputs, name=name: getattr(self, name)(*inputs) for name in names}
            )
            for file, names in (("rms_norm", ["norm"]), ("gate", ["gated", "gated_halves"]), ("rotary", ["rotate"]))
        }

    def norm(self, values, weight, epsilon, variant):
        self.calls["norm"] += 1
        self.variant = variant
        return norm_torch.norm(values, weight, epsilon, variant)

    def gated(self, gate, up, activation):
        self.calls["gated"] += 1
        self.variant = activation
        return gate_torch.gated(gate.float(), up.float(), activation).to(gate.dtype)

    def gated_halves(self, gate_up, activation, gate_first):
        self.calls["gated_halves"] += 1
        self.variant = activation, gate_first
        return gate_torch.gated_halves(gate_up.float(), activation, gate_first).to(gate_up.dtype)

    def rotate(self, q, k, cos, sin):
        self.calls["rotate"] += 1

        def turn(heads):
            first, second = heads.float().chunk(2, -1)
            turned = torch.cat([-second, first], -1)
            return (heads.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(heads.dtype)

        return turn(q), turn(k)
