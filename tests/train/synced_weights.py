"""The weights that verl's real engine gives to rollout after updates, beside those that it trains, as a program.

python tests/train/synced_weights.py MODEL STRATEGY [--lora] [--outside] [--packed] [--fused] prints JSON.
FlagGems' operators and the fused kernels are stand-ins for the CPU.  --outside: FSDP2 shards no attention alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flaggems"))

import torch

LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}
MLPS_ALONE = {"wrap_policy": {"transformer_layer_cls_to_wrap": ["Qwen2MLP"]}}


def whole(weight: Any) -> Any:
    """Return a copy of all of a weight, of which FSDP2 gives a rank its part."""
    return getattr(weight, "full_tensor", lambda: weight)().detach().clone()


def given(engine: Any) -> dict[str, Any]:
    """Return what rollout gets."""
    weights, _ = engine.get_per_tensor_param()
    return {name: whole(weight) for name, weight in weights}


def trained(engine: Any) -> dict[str, Any]:
    """Return what the engine's optimizer steps, by transformers' names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    of_fsdp1 = isinstance(engine.module, FullyShardedDataParallel)
    summon = FullyShardedDataParallel.summon_full_params(engine.module, writeback=False) if of_fsdp1 else None
    with summon or contextlib.nullcontext():
        return {
            name.replace("_fsdp_wrapped_module.", ""): whole(weight)
            for name, weight in engine.module.named_parameters()
        }


def log_probs(model: str, weights: dict[str, Any]) -> list[float]:
    """Return what ``infer`` does, from a model of transformers' own with these weights, alone and in fp32."""
    from real_engine import make_batch
    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(model).float().eval()
    alone.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=True)
    found: list[float] = []
    with torch.no_grad():
        for row in make_batch(seed=7)["input_ids"].unbind():
            likely = alone(row[None]).logits[0, :-1].log_softmax(-1)
            found += likely.gather(-1, row[1:, None])[:, 0].tolist()
    return found


def main() -> None:
    import stand_ins as operators
    from fused.stand_ins import StandIns
    from real_engine import infer, join_group, make_engine, train

    from verl_fl_overlay.flaggems import library
    from verl_fl_overlay.kernels import agreement

    library.load = operators.gems
    torch.set_num_threads(1)
    import verl  # noqa: F401

    from verl_fl_overlay.activation import report
    from verl_fl_overlay.features.fused import Fused
    from verl_fl_overlay.settings import Settings

    model, strategy, *options = sys.argv[1:]
    packed = "--packed" in options
    join_group(plain=False)
    sys.modules.update(StandIns().modules())
    agreement.NATIVE_DEVICES = ()
    fused = Fused(Settings.of(fused=("auto",)))
    if "--fused" in options:
        fused.start()
    torch.manual_seed(0)
    wrapped = MLPS_ALONE if "--outside" in options else {}
    engine = make_engine(model, strategy, "lm", packed=packed, hf=LORA if "--lora" in options else {}, **wrapped)
    before = given(engine)
    train(engine, "lm", 3, packed)
    calls = operators.calls.total()
    after = given(engine)
    native = operators.calls.total() == calls
    stepped = trained(engine)
    told = {
        "names": sorted(after),
        "moved": sorted(name for name in after if not torch.equal(after[name], before[name])),
        "as trained": sorted(n for n, w in after.items() if n in stepped and torch.equal(w, stepped[n].to(w.dtype))),
        "of the engine": infer(engine, "lm", packed),
        "of the weights": log_probs(model, after),
        "of those before": log_probs(model, before),
        "native": native,
        "operators": calls,
        "replaced": fused.describe()["replaced"],
        "features": {name: each.get("detail") for name, each in report()["features"].items()},
    }
    print("RESULT " + json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
