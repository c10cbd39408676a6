"""A tiny Qwen2 and an arithmetic data set, made from a seed: nothing is downloaded.

``python examples/arithmetic.py FOLDER`` writes ``FOLDER/model`` (Hugging Face format, random weights, one token a
character) and ``FOLDER/train.parquet``, ``FOLDER/val.parquet`` with chat messages such as "3+4=" -> "7".
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+-*/= ?.:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> Any:
    """Return a tokenizer with one token a character and Qwen's chat markers."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def write_model(folder: Path, seed: int = 0, **overrides: Any) -> None:
    """Write a Qwen2 of 2 layers and 64 hidden units; ``overrides`` are fields of its configuration."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "pad_token_id": words.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            **overrides,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def problems(count: int, seed: int, largest: int = 9) -> list[tuple[str, str]]:
    """Return ``count`` pairs of question and answer, the same for the same seed."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(0, largest), numbers.randint(0, largest)) for _ in range(count)]
    return [(f"{a}+{b}=", str(a + b)) for a, b in pairs]


def write_chats(file: Path, count: int, seed: int) -> None:
    """Write ``count`` problems as a parquet file with a column ``messages``."""
    import pandas

    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in problems(count, seed)
    ]
    pandas.DataFrame({"messages": rows}).to_parquet(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_chats(folder / "train.parquet", count=512, seed=1)
    write_chats(folder / "val.parquet", count=32, seed=2)
    print(f"{folder}: model, train.parquet, val.parquet")


if __name__ == "__main__":
    main()
