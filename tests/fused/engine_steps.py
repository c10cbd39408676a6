"""verl's real engines under FSDP1 and FSDP2 on a CPU: steps without the feature, then with it, with stand-ins.

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
from verl_fl_overlay.features.fused import Fused
from verl_fl_overlay.kernels import agreement as fused_check
from verl_fl_overlay.settings import Settings

torch.set_num_threads(1)
join_group(False)
stand_ins = StandIns()
sys.modules.update(stand_ins.modules())
fused_check.NATIVE_DEVICES = ()
own_kernel = torch._fused_adamw_


def adamw(*args, **kwargs):
    """Be torch's kernel, which is there for the CPU too."""
    stand_ins.calls["adam"] += 1
    return own_kernel(*args, **kwargs)


torch._fused_adamw_ = adamw
stand_ins.calls["adam"] = 0
result = {}
for strategy in ("fsdp", "fsdp2"):
    told, names, groups = {}, {}, {}
    for kind, asked in {"native": (), "fused": ("auto",)}.items():
        torch.manual_seed(0)
        fused = Fused(Settings.of(fused=asked))
        fused.start()  # the hook on initialize tells it of the engine
        before = dict(stand_ins.calls)
        engine = make_engine(sys.argv[1], strategy, "lm")
        told[kind] = {"steps": train(engine, "lm", 3), "replaced": fused.describe()["replaced"]}
        told[kind]["calls"] = {name: count - before[name] for name, count in stand_ins.calls.items()}
        names[kind] = list(engine.module.state_dict())
        groups[kind] = engine.optimizer.state_dict()["param_groups"]
        fused.stop()
    assert names["fused"] == names["native"]
    assert groups["fused"] == groups["native"]
    result[strategy] = told
print(json.dumps(result))
torch.distributed.destroy_process_group()
