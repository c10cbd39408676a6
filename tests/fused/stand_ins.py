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

    def rotate(self, heads, cos, sin, layout):
        self.calls["rotate"] += 1
        return tuple(self._turn(each, cos.float(), sin.float(), layout) for each in heads)

    def _turn(self, heads, cos, sin, layout):
        result = list(heads.float().unbind(-1))
        for pair in range(layout.number):
            (x1, x2), (y1, y2), (a1, a2) = (
                (place.step * pair + start, place.step * pair + place.apart + start)
                for place, start in ((layout.source, layout.start), (layout.result, layout.start), (layout.angles, 0))
            )
            position = sum(pair >= end for end in layout.sections)
            c, s = (angles[position] if angles.dim() == 4 else angles for angles in (cos, sin))
            c, s = c[:, None], s[:, None]
            result[y1] = heads[..., x1].float() * c[..., a1] - heads[..., x2].float() * s[..., a1]
            result[y2] = heads[..., x2].float() * c[..., a2] + heads[..., x1].float() * s[..., a2]
        return torch.stack(result, -1).to(heads.dtype)
