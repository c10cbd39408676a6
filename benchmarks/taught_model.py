"""A model that adds two digits most of the time and goes on for as long as answers in reinforcement learning do.

It is taught from random weights, so that nothing is downloaded, until it gives the right digit with a probability that
leaves reinforcement learning something to do.  Behind the number it writes dots, log-normally many.  Its head covers a
vocabulary of any size, which costs what it costs in a real model; all tokens beyond the tokenizer's are unlearnt.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

SIGMA = 0.8
"""How widely the logarithms of the answers' lengths are spread."""

SURE, LESSONS = 0.5, 400
"""The teaching ends when the first digit of the right answer has this probability, or after so many updates."""


@dataclass(frozen=True)
class Size:
    """A Qwen2's sizes; questions have up to ``prompt`` tokens, answers ``response`` on average, ``longest`` at most.

    The learning rates are those of the teaching and of the reinforcement learning that follows.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int
    response: int
    longest: int
    rate: float
    later_rate: float
    rows: int = 32


SIZES = {
    "1.5B": Size(1536, 8960, 28, 24, 4, 151936, prompt=128, response=160, longest=512, rate=3e-4, later_rate=3e-5),
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, prompt=128, response=160, longest=640, rate=3e-4, later_rate=5e-5),
    "0.2B": Size(896, 4864, 12, 14, 2, 32768, prompt=128, response=160, longest=640, rate=5e-4, later_rate=1e-4),
    "small": Size(896, 2432, 4, 14, 2, 8192, prompt=64, response=48, longest=192, rate=1e-3, later_rate=2e-4),
    "tiny": Size(64, 128, 2, 4, 2, 128, prompt=24, response=3, longest=6, rate=3e-3, later_rate=1e-3),
}
MARKERS = len("<user\n>\n<assistant\n")
"""Tokens of a question beside its characters: chat markers, which are one token each, and the roles."""


def questions(size: Size, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield question and number: zeros, as many as there is room for or fewer, then a sum of two digits."""
    from arithmetic import problems

    numbers = random.Random(seed)
    for question, answer in problems(count, seed):
        yield "0" * numbers.randint(0, size.prompt - MARKERS - len(question)) + question, answer


def lesson(words: Any, size: Size, seed: int) -> tuple[Any, Any]:
    """Return (rows, length) token ids and labels; a label is -100 where nothing is to be learnt."""
    import torch

    numbers = random.Random(seed)
    mean = math.log(size.response) - SIGMA**2 / 2
    texts = []
    for question, answer in questions(size, size.rows, seed):
        dots = min(round(numbers.lognormvariate(mean, SIGMA)), size.longest - len(answer) - 1)
        asked = words(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        texts.append((asked, words(f"{answer}{'.' * dots}<|im_end|>")["input_ids"]))
    longest = max(len(asked) + len(told) for asked, told in texts)
    tokens = torch.full((size.rows, longest), words.pad_token_id)
    labels = torch.full((size.rows, longest), -100)
    for row, (asked, told) in enumerate(texts):
        end = len(asked) + len(told)
        tokens[row, :end] = torch.tensor(asked + told)
        labels[row, len(asked) : end] = torch.tensor(told)
    return tokens, labels


def teach(folder: Path, size: Size, device: str, lessons: int = LESSONS) -> dict[str, float]:
    """Write the model to ``folder``, in bf16; return what it has learnt in as many updates or fewer."""
    import torch
    from arithmetic import tokenizer
    from step import configuration
    from transformers import Qwen2ForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    known = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    config = configuration(size, tie_word_embeddings=True, **known)
    model = Qwen2ForCausalLM(config).to(device)
    model.gradient_checkpointing_enable()  # without it a lesson of the 1.5B model takes more than 80 GB
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.0, fused=device == "cuda")
    sure, loss, begun = 0.0, math.inf, time.monotonic()
    for update in range(lessons):
        for group in optimizer.param_groups:
            group["lr"] = size.rate * min(1.0, (update + 1) / 20)
        tokens, labels = (tensor.to(device) for tensor in lesson(words, size, seed=1000 + update))
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            kept = labels[:, 1:] != -100
            logits = model.lm_head(hidden[kept])
        chosen = labels[:, 1:][kept]
        losses = torch.nn.functional.cross_entropy(logits.float(), chosen, reduction="none")
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first = kept.nonzero()[:, 0].diff(prepend=torch.tensor([-1], device=device)) > 0
        loss, sure = losses.mean().item(), 0.9 * sure + 0.1 * (-losses[first]).exp().mean().item()
        if update % 20 == 0 or sure >= SURE:
            print(f"  update {update}: loss {loss:.3f}, right with probability {sure:.2f}", flush=True)
        if sure >= SURE:
            break
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    about = {"updates": update + 1, "loss": loss, "right": sure, "seconds": time.monotonic() - begun}
    (folder / "taught.json").write_text(json.dumps({**asdict(size), **about}))
    return about


def main(folder: str, name: str, device: str, lessons: str) -> None:
    """Write model and questions of one of ``SIZES``."""
    from arithmetic import write_questions

    size = SIZES[name]
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_questions(Path(folder) / "problems.parquet", questions(size, count=2048, seed=1))
    print(teach(Path(folder) / "model", size, device, int(lessons)))


if __name__ == "__main__":
    main(*sys.argv[1:])
