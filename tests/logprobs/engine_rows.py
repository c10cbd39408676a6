"""One real engine, in a process of its own: log-probs, three steps, and whether verl's loop over rows was called.

python tests/logprobs/engine_rows.py MODEL prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl.utils.torch_functional as verl_functional
from real_engine import infer, join_group, make_engine, train

calls = 0
native = verl_functional.logprobs_from_logits_v2


def counted(*args, **kwargs):
    global calls
    calls += 1
    return native(*args, **kwargs)


verl_functional.logprobs_from_logits_v2 = counted
torch.manual_seed(0)
torch.set_num_threads(1)
join_group(False)
engine = make_engine(sys.argv[1], "fsdp2", "lm")
result = {"log_probs": infer(engine, "lm"), "steps": train(engine, "lm", 3), "calls_of_rows": calls}

from verl_fl_overlay.activation import report as build  # noqa: E402

print(json.dumps({**result, "kernels": build()["features"]["logprobs"]["detail"]["kernels"]}))
torch.distributed.destroy_process_group()
