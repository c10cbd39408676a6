"""The three fused kernels in plain torch: for the CPU, on which there are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class StandIns:
    def __init__(self):
        self.calls = {"rms_norm": 0, "silu_and_mul": 0, "rotate": 0}

    def modules(self) -> dict[str, Any]:
        """Return what takes the place of the modules with the kernels in ``sys.modules``."""
        return {
            f"verl_fl_overlay.kernels.triton.{file}": SimpleNamespace(
                **{name: lambda *inputs, name=name: getattr(self, name)(*inputs)}
            )
            for file, name in (("rms_norm", "rms_norm"), ("gate", "silu_and_mul"), ("rotary", "rotate"))
        }

    def rms_norm(self, values, weight, epsilon):
        self.calls["rms_norm"] += 1
        exact = values.float()
        return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()).to(values.dtype)

    def silu_and_mul(self, gate, up):
        self.calls["silu_and_mul"] += 1
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    def rotate(self, q, k, cos, sin):
        self.calls["rotate"] += 1

        def turn(heads):
            first, second = heads.float().chunk(2, -1)
            turned = torch.cat([-second, first], -1)
            return (heads.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(heads.dtype)

        return turn(q), turn(k)
