"""What a run does with verl's real engines beside training steps: offload, save, load, weight sync, a reference.

Prints JSON, a list for each strategy:  python tests/train/engine_life.py MODEL FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from real_engine import infer, join_group, make_engine, train

OFFLOAD = {"param_offload": True, "optimizer_offload": True}
VARIANTS = {
    "plain": {},
    "offload": OFFLOAD,
    "activations": {"hf": {"enable_activation_offload": True}},
}


def sent(engine: Any) -> dict[str, list[float]]:
    """Return the weights that a rollout gets, whole."""
    weights, _ = engine.get_per_tensor_param()
    return {name: rounded(weight) for name, weight in weights}


def rounded(weight: Any) -> list[float]:
    """Return the weight in bf16, in which some releases send it."""
    numbers: list[float] = weight.bfloat16().double().flatten().tolist()
    return numbers


def held(folder: str) -> dict[str, list[float]]:
    """Return the weights of a checkpoint of one rank."""
    found = torch.load(Path(folder, "model_world_size_1_rank_0.pt"), weights_only=False)
    whole = {name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight for name, weight in found.items()}
    return {name: rounded(weight) for name, weight in whole.items()}


def life(model: str, strategy: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train, save, train on, go back to what was saved and train on again."""
    torch.manual_seed(0)
    engine = make_engine(model, strategy, "lm", **options)
    first = train(engine, "lm", 1)
    engine.save_checkpoint(folder)
    synced = sent(engine)
    onward = train(engine, "lm", 2)
    engine.load_checkpoint(folder)
    same = sent(engine) == synced == held(folder)
    again = train(engine, "lm", 2)
    return {"steps": first + onward, "again": again, "weights are those of the checkpoint": same}


def reference(model: str, strategy: str) -> dict[str, list[float]]:
    """Return the log-probs of an engine that is never trained, and those of one that may be."""
    engines = {
        name: make_engine(model, strategy, "lm", forward_only=name == "reference") for name in ("actor", "reference")
    }
    return {name: infer(engine, "lm") for name, engine in engines.items()}


def main() -> None:
    torch.set_num_threads(1)
    import verl  # noqa: F401

    join_group(plain=False)
    model, folder = sys.argv[1:]
    found = {
        strategy: {
            "lives": {n: life(model, strategy, f"{folder}/{strategy}-{n}", o) for n, o in VARIANTS.items()},
            "log_probs": reference(model, strategy),
        }
        for strategy in ("fsdp", "fsdp2")
    }
    print("RESULT " + json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
