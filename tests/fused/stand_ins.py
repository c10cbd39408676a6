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
