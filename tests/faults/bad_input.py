"""What verl says to input that cannot be: prints, a case each, error, text, and whose code raised it.

``python tests/faults/bad_input.py FOLDER [--plain]``; FOLDER gets a model that has no head for language.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_engine


def no_language(folder: Path) -> str:
    """Write a small vision model, of which no language model can be made, with the tokenizer of the tiny Qwen2."""
    from arithmetic import tokenizer
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**size, image_size=8, patch_size=8)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def asked(backend: str) -> Callable[[], Any]:
    from verl.workers.engine import EngineRegistry

    return lambda: EngineRegistry.new(model_type="language_model", backend=backend)


def without_megatron() -> None:
    """Import the engine where megatron-core is missing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron" or "engine.megatron" in name]:
        del sys.modules[name]
    sys.modules["megatron"] = None  # type: ignore[assignment]
    importlib.import_module("verl.workers.engine.megatron.transformer_impl")


def main() -> None:
    plain = "--plain" in sys.argv
    import verl

    real_engine.join_group(plain)
    model = no_language(Path(sys.argv[1]))
    lacking = "automodel" if verl.__version__ < "0.8" else "mindspeed_megatron"
    cases = {
        "a strategy misspelt": asked("fsdp3"),
        "a backend the release lacks": asked(lacking),
        "a model without a language head": lambda: real_engine.make_engine(model, "fsdp2", "lm", plain=plain),
        "megatron-core missing": without_megatron,
    }
    told = {}
    for case, call in cases.items():
        try:
            call()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            told[case] = {"error": [type(error).__name__, str(error)], "raised in": frames[-1].filename}
    print("RESULT " + json.dumps({"told": told, "overlay": "verl_fl_overlay.activation" in sys.modules}))


if __name__ == "__main__":
    main()
