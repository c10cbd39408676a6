"""verl's real engines under FSDP1 and FSDP2 on a CPU: steps on native modules, then on fused ones, with stand-ins.

python tests/fused/engine_steps.py MODEL prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl  # noqa: F401
from real_engine import join_group, make_engine, train

from fused.stand_ins import StandIns
from verl_fl_overlay import fused, fused_forward
from verl_fl_overlay.variables import FUSED

torch.set_num_threads(1)
join_group(False)
stand_ins = StandIns()
fused_forward.kernels, fused_forward.NATIVE_DEVICES = lambda: stand_ins, ()
result = {}
for strategy in ("fsdp", "fsdp2"):
    steps = {}
    for kinds in ((), FUSED):
        torch.manual_seed(0)
        engine = make_engine(sys.argv[1], strategy, "lm")
        made = fused.FusedModules(kinds)
        names = list(engine.module.state_dict())
        if kinds:
            made.fuse(engine.module)
        before = dict(stand_ins.calls)
        steps["fused" if kinds else "native"] = train(engine, "lm", 3)
        calls = {name: stand_ins.calls[name] - before[name] for name in before}
        assert list(engine.module.state_dict()) == names
        made.remove()
    result[strategy] = {**steps, "calls": calls}
print(json.dumps(result))
torch.distributed.destroy_process_group()
