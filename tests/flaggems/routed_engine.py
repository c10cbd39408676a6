"""verl's real FSDP2 engine on a CPU with the stand-ins routed, as a program; prints what it saw as JSON.

python tests/flaggems/routed_engine.py MODEL [FLAGGEMS_OPERATORS]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main() -> None:
    import stand_ins
    import torch
    from real_engine import infer, join_group, make_batch, make_engine, sft_loss

    from verl_fl_overlay.flaggems import library

    library.load = stand_ins.gems
    torch.manual_seed(0)
    torch.set_num_threads(1)
    import verl  # noqa: F401

    from verl_fl_overlay.activation import report as build

    join_group(plain=False)
    seen = {"initialize": stand_ins.calls.total()}
    engine = make_engine(sys.argv[1], "fsdp2", "lm")
    critic = make_engine(sys.argv[1], "fsdp2", "value")  # a second engine in the process

    def outside() -> bool:
        before = stand_ins.calls.total()
        a = torch.rand(4, 4)
        torch.where(a * a > 0.1, a @ a, 0.5)
        return stand_ins.calls.total() == before

    native_outside = [outside()]
    steps = []
    for _ in range(3):
        before = dict(stand_ins.calls)
        with engine.train_mode():
            output = engine.train_batch(make_batch(), loss_function=sft_loss())
            engine.lr_scheduler_step()
        native_outside.append(outside())
        steps.append(
            {
                "loss": sum(float(value) for value in output["loss"]),
                "grad_norm": float(output["metrics"]["grad_norm"]),
                "calls": {name: count - before.get(name, 0) for name, count in stand_ins.calls.items()},
            }
        )
    try:
        with engine.train_mode():
            engine.train_batch(make_batch(), loss_function=lambda **given: 1 / 0)
    except ZeroDivisionError:
        native_outside.append(outside())
    values = infer(critic, "value")
    native_outside.append(outside())
    detail = build()["features"]["flaggems"].get("detail")
    print(
        "RESULT " + json.dumps({"steps": steps, "outside": native_outside, "values": values, "detail": detail, **seen})
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
