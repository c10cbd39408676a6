"""Trains with verl's FSDP engines without gradient checkpointing, activations offloaded or not; prints the steps.

python tests/train/offloaded_activations.py MODEL
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from real_engine import join_group, make_engine, train


def main() -> None:
    torch.set_num_threads(1)
    import verl  # noqa: F401
    from verl.utils import activation_offload

    if not torch.cuda.is_available():  # torch pins no memory there
        handler = activation_offload.SynchronizedGroupOffloadHandler
        handler.offload = staticmethod(partial(handler.offload, pin_memory=False))
    join_group(plain=False)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for strategy in ("fsdp", "fsdp2"):
        for name, offload in (("kept", False), ("offloaded", True)):
            torch.manual_seed(0)
            engine = make_engine(sys.argv[1], strategy, "lm", hf={"enable_activation_offload": offload})
            found.setdefault(strategy, {})[name] = train(engine, "lm", 2)
    print("RESULT " + json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
