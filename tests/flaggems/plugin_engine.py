"""verl's FSDP2 engine of verl-hardware-plugin's class, beside the overlay, as a program; prints what it saw as JSON.

python tests/flaggems/plugin_engine.py MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main() -> None:
    import torch
    import verl  # noqa: F401
    from real_engine import join_group, make_batch, make_engine, sft_loss

    from verl_fl_overlay.activation import report
    from verl_fl_overlay.flaggems.dispatcher import registered_in

    join_group(plain=True)  # if the plugin is loaded first, verl has chosen CUDA before the overlay says cpu
    engine = make_engine(sys.argv[1], "fsdp2", "lm")
    with engine.train_mode():
        output = engine.train_batch(make_batch(), loss_function=sft_loss())
    told = {
        "engine": type(engine).__name__,
        "grad_norm": float(output["metrics"]["grad_norm"]),
        "mm after": "others" if "flag_gems" in registered_in("mm", "CPU") else "torch",
        "report": report(),
    }
    print("RESULT " + json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
