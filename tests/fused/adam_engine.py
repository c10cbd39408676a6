"""verl's engines: steps, a checkpoint, and steps from it, with torch's fused Adam and without, each from the other's.

python tests/fused/adam_engine.py MODEL FOLDER prints JSON.  On a GPU weights and states are offloaded between steps;
a CPU, which has the kernel too, takes a chip's part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl  # noqa: F401
from real_engine import join_group, make_engine, train

from verl_fl_overlay.features.fused import Fused
from verl_fl_overlay.kernels import agreement as fused_check
from verl_fl_overlay.settings import Settings

join_group(False)
model, folder = sys.argv[1:]
offload = torch.cuda.is_available()
strategies = ("fsdp2", "fsdp") if offload else ("fsdp2",)
if not offload:
    torch.set_num_threads(1)
    fused_check.NATIVE_DEVICES = ()
kernel, calls = torch._fused_adamw_, []
torch._fused_adamw_ = lambda *args, **options: calls.append(1) or kernel(*args, **options)


def run(strategy: str, asked: tuple[str, ...], *, resume: bool) -> dict[str, object]:
    """Train two steps and save (or load them), then train two more."""
    fused = Fused(Settings.of(fused=asked))
    if asked:
        fused.start()
    calls.clear()
    torch.manual_seed(0)
    engine = make_engine(model, strategy, "lm", param_offload=offload, optimizer_offload=offload)
    if resume:
        # Not the random numbers' state, which plain verl cannot set on a CPU; nothing here draws any.
        engine.checkpoint_manager.checkpoint_load_contents = ["model", "optimizer"]
        engine.load_checkpoint(f"{folder}/{strategy}", del_local_after_load=False)
    else:
        train(engine, "lm", 2)
        engine.save_checkpoint(f"{folder}/{strategy}", global_step=2)
    told = {"steps": train(engine, "lm", 2), "replaced": fused.describe()["replaced"], "calls": len(calls)}
    fused.stop()
    return told


result = {
    strategy: {
        "native": run(strategy, (), resume=False),
        "fused from native's": run(strategy, ("adam",), resume=True),
        "fused": run(strategy, ("adam",), resume=False),
        "native from fused's": run(strategy, (), resume=True),
    }
    for strategy in strategies
}
print("RESULT " + json.dumps(result))
torch.distributed.destroy_process_group()
