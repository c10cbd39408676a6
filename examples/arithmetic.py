"""A tiny Qwen2 and an arithmetic data set, made from a seed: nothing is downloaded.

``python examples/arithmetic.py FOLDER`` writes ``FOLDER/model`` (Hugging Face format, random weights, one token a
character), ``FOLDER/train.parquet``, ``FOLDER/val.parquet`` with chat messages such as "3+4=" -> "7", and
``FOLDER/problems.parquet`` with the same questions for reinforcement learning, whose answers ``reward`` judges.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable
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
    """Return a tokenizer with one token a character and Qwen's chat markers.

    It is byte-level BPE without merges, so that it means the same when transformers 5 loads it as a Qwen2 tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytelevel = {" ": "\u0120", "\n": "\u010a"}  # how byte-level BPE writes them
    tokens = [*SPECIAL, *(bytelevel.get(character, character) for character in CHARACTERS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
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


def write_problems(file: Path, count: int, seed: int) -> None:
    """Write ``count`` problems as a parquet file with the columns that verl's reinforcement learning reads."""
    write_questions(file, problems(count, seed))


def write_questions(file: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write pairs of question and answer with those columns."""
    import pandas

    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index},
        }
        for index, (question, answer) in enumerate(pairs)
    ]
    pandas.DataFrame(rows).to_parquet(file)


def reward(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any) -> float:
    """Return 1 for the right number, less the farther off it is, 0 for a text that does not begin with a number."""
    number = re.match(r"\d+", solution_str)
    return 1 / (1 + abs(int(number[0]) - int(ground_truth))) if number else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_chats(folder / "train.parquet", count=512, seed=1)
    write_chats(folder / "val.parquet", count=32, seed=2)
    write_problems(folder / "problems.parquet", count=512, seed=1)
    print(f"{folder}: model, train.parquet, val.parquet, problems.parquet")


if __name__ == "__main__":
    main()
