"""Value models without a token classifier, which verl gives trl's value head, on verl's real FSDP engine.

Prints JSON:  python tests/train/value_models.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_engine
import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
}
ROTATION = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}}
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}


def write(kind: str, folder: Path) -> None:
    """Write a tiny model of this kind and its tokenizer."""
    from arithmetic import tokenizer

    words = tokenizer()
    sizes = {**SIZES, "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    if kind == "cohere":
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes))
    else:
        config = transformers.Qwen2VLConfig(
            text_config={**sizes, **ROTATION}, vision_config=VISION, tie_word_embeddings=False
        )
        model = transformers.Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def four_positions(make: Any) -> Any:
    """Give every token four positions as verl does for models that see: in the text, in time, down and across."""

    def made(*args: Any, **kwargs: Any) -> Any:
        batch = make(*args, **kwargs)
        rows = [positions.expand(4, -1).contiguous() for positions in batch["position_ids"].unbind()]
        batch["position_ids"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return batch

    return made


def values_of(model: Path, packed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = real_engine.make_engine(str(model), "fsdp2", "value", packed=packed)
    values = real_engine.infer(engine, "value", packed)
    (step,) = real_engine.train(engine, "value", 1, packed)
    attention = engine.module.pretrained_model.config._attn_implementation
    return {"attention": attention, "values": values, "grad_norm": step["grad_norm"]}


def main() -> None:
    torch.set_num_threads(1)
    import verl  # noqa: F401

    real_engine.join_group(plain=False)
    found: dict[str, Any] = {}
    make = real_engine.make_batch
    for kind in ("cohere", "qwen2_vl"):
        model = Path(sys.argv[1], kind)
        write(kind, model)
        real_engine.make_batch = make if kind == "cohere" else four_positions(make)
        found[kind] = {name: values_of(model, packed=name == "packed") for name in ("packed", "padded")}

    from verl_fl_overlay.activation import report

    print("RESULT " + json.dumps({**found, "report": report()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
