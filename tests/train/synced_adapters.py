"""The LoRA adapters that verl's real engine gives to rollout, beside those that it trains, as a program.

python tests/train/synced_adapters.py MODEL STRATEGY [--layered] [--outside] [--embeddings] prints JSON.
--layered: with layered_summon.  --outside: FSDP2 shards no attention alone.
--embeddings: adapters are on embeddings and queries, and merged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from synced_weights import LORA, MLPS_ALONE, trained, whole


def main() -> None:
    torch.set_num_threads(1)
    import verl  # noqa: F401
    from real_engine import join_group, make_engine, train

    model, strategy, *options = sys.argv[1:]
    join_group(plain=False)
    wrapped = MLPS_ALONE if "--outside" in options else {}
    embeddings = "--embeddings" in options
    lora = {**LORA, "target_modules": ["embed_tokens", "q_proj"]} if embeddings else {**LORA, "lora": {}}
    engine = make_engine(model, strategy, "lm", hf=lora, **wrapped)
    train(engine, "lm", 1)
    weights, _ = engine.get_per_tensor_param(layered_summon="--layered" in options, base_sync_done=True)
    got = {name: whole(weight).cpu() for name, weight in dict(weights).items()}
    own = {name.replace(".default", ""): weight for name, weight in trained(engine).items() if "lora_" in name}
    alike = got.keys() == own.keys() and all(torch.equal(got[name], own[name]) for name in got)
    told = {"given": len(got), "as trained": alike}
    print("RESULT " + json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
