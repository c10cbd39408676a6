"""A model that has learnt to add digits, and vLLM with it in the environment of verl's rollout; prints JSON.

python tests/gpu/plugin_generation.py FOLDER  trains the model on the GPU and writes it into FOLDER
python tests/gpu/plugin_generation.py FOLDER --generate  answers every question greedily

A trained model's first choice is far ahead of its second, so other kernels give the same answers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples")]

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 2432,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
"""Qwen2.5-0.5B's layers, half as wide inside, with heads of 64."""

QUESTIONS = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
LEARNT = 2e-3
"""The loss of a model that is sure of every answer."""

STARTED = time.monotonic()


def stage(text: str) -> None:
    """Say how far it is: what follows can take a minute."""
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", file=sys.stderr, flush=True)


class Told:
    """What vLLM's worker tells of itself: vLLM makes this a base of its worker's class, as it does verl's extension."""

    model_runner: Any

    def told(self) -> dict[str, Any]:
        """Return the plugin's lists, the operators that FlagGems registered, and the classes of the model's layers."""
        layers = {
            f"{type(m).__module__.partition('.')[0]}.{type(m).__name__}" for m in self.model_runner.model.modules()
        }
        found = {"layers": sorted(layers), "overlay": "verl_fl_overlay" in sys.modules}
        if "vllm_fl" not in sys.modules:
            return found
        import flag_gems
        from vllm_fl.utils import get_flag_gems_whitelist_blacklist

        whitelist, blacklist = get_flag_gems_whitelist_blacklist()
        registered = sorted(set(flag_gems.all_registered_ops()))
        return {**found, "whitelist": whitelist, "blacklist": blacklist, "registered": registered}


def chats(words: Any) -> list[str]:
    """Return each question as a chat that the assistant has to go on with."""
    return [
        words.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        for question, _ in QUESTIONS
    ]


def train(folder: Path, steps: int = 1000, device: str = "cuda", **overrides: Any) -> None:
    """Write a model that answers the questions.

    Raises:
        SystemExit: it has not learnt them.
    """
    import torch
    from arithmetic import tokenizer, write_model
    from transformers import AutoModelForCausalLM

    stage("training")
    write_model(folder, **{**SHAPE, **overrides})
    words = tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    asked = [words(chat)["input_ids"] for chat in chats(words)]
    answers = [[*words(answer)["input_ids"], words.eos_token_id] for _, answer in QUESTIONS]
    rows = [question + answer for question, answer in zip(asked, answers, strict=True)]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [words.pad_token_id] * (length - len(row)) for row in rows], device=device)
    labels = torch.tensor(
        [
            [-100] * len(question) + answer + [-100] * (length - len(question) - len(answer))
            for question, answer in zip(asked, answers, strict=True)
        ],
        device=device,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(steps):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or loss < LEARNT:
            stage(f"step {step}: loss {loss:.4f}")
        if loss < LEARNT:
            break
    else:
        raise SystemExit(f"the model has not learnt to add in {steps} steps: loss {loss:.4f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    stage("trained")


def generate(folder: Path) -> dict[str, Any]:
    """Return the tokens, their log-probs and the texts of the greedy answers, and what the worker tells."""
    import verl  # noqa: F401 (it loads the overlay, as in verl's server)

    stage("verl is loaded")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    stage("vLLM is loaded")
    engine = LLM(
        str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.3,
        worker_extension_cls="plugin_generation.Told",
    )
    stage("the engine is there")
    told = engine.collective_rpc("told")[0]
    answers = engine.generate(
        chats(AutoTokenizer.from_pretrained(folder)), SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    )
    stage("it has answered")
    first = [answer.outputs[0] for answer in answers]
    return {
        "tokens": [list(one.token_ids) for one in first],
        "logprobs": [
            [row[token].logprob for token, row in zip(one.token_ids, one.logprobs, strict=True)] for one in first
        ],
        "texts": [one.text for one in first],
        **told,
    }


if __name__ == "__main__":
    if "--generate" in sys.argv:
        print("RESULT " + json.dumps(generate(Path(sys.argv[1]))), flush=True)
    else:
        train(Path(sys.argv[1]))
