"""Log-probs and entropy from hidden states with all logits and a part at a time: time, memory, and the error of dW.

python benchmarks/head.py [--tokens 32768] [--hidden 3584] [--vocabulary 152064] [--json FILE]; rows run in turns.  On a
CPU a small case is run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from verl_fl_overlay.kernels.agreement import Agreement
from verl_fl_overlay.kernels.head import ChunkedHead
from verl_fl_overlay.kernels.logprobs import TokenLogprobs
from verl_fl_overlay.kernels.tokens import HEAD, Sealed, TokenQuestion

ROWS = ("logits", "chunked")
TURNS = 5


class Body(nn.Module):
    """Gives hidden states as they are."""

    def forward(self, hidden: Tensor) -> SimpleNamespace:
        """Return what a model's body returns."""
        return SimpleNamespace(last_hidden_state=hidden)


class Model(nn.Module):
    """The end of a language model: what makes logits of hidden states."""

    base_model_prefix = "model"

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(hidden, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, as transformers' models do."""
        return self.lm_head

    def forward(self, hidden: Tensor) -> SimpleNamespace:
        """Return what a model of transformers returns."""
        return SimpleNamespace(logits=self.lm_head(self.model(hidden).last_hidden_state))


class Pass:
    """One training pass over the head, with entropy and a PPO-like upstream gradient."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16
        self.model = Model(hidden, vocabulary).to(device, dtype)
        nn.init.normal_(self.model.lm_head.weight, std=0.02)
        self.hidden = torch.randn(1, tokens, hidden, dtype=dtype, device=device).requires_grad_()
        self.labels = torch.randint(0, vocabulary, (tokens,), device=device)
        self.upstream = torch.randn(2, tokens, device=device) / tokens
        self.tokens = TokenLogprobs(Agreement())
        self.heads = ChunkedHead(self.tokens, required=True)

    def run(self, row: str) -> None:
        """Run forward and backward; the gradients are left where they belong."""
        self.model.lm_head.weight.grad = self.hidden.grad = None
        asked = TokenQuestion(None, self.labels, 0.9, entropy=True, in_place=True)
        if row == "chunked":
            self.heads.prepare(self.model)
            found = self.model(self.hidden, **{HEAD: Sealed(asked)})
            log_probs, entropy = found["log_probs"], found["entropy"]
        else:
            logits = self.model(self.hidden).logits.squeeze(0)
            given = TokenQuestion(logits, self.labels, 0.9, entropy=True, in_place=True)
            log_probs, entropy, _ = self.tokens(given)
            del logits, given
        ((log_probs * self.upstream[0]).sum() + (entropy * self.upstream[1]).sum()).backward()

    def exact(self, columns: slice) -> Tensor:
        """Return these rows of dW in fp64, from fp32 logits of all columns."""
        states, weight = self.hidden.detach()[0].double(), self.model.lm_head.weight.detach()
        total = torch.zeros(weight[columns].shape, dtype=torch.float64, device=weight.device)
        for first in range(0, states.shape[0], 512):
            part = slice(first, first + 512)
            logits = (states[part].float() @ weight.float().T).double() / 0.9
            logs = logits.log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1, keepdim=True)
            logs, index = logs[:, columns], torch.arange(weight.shape[0], device=weight.device)[columns]
            hit = (self.labels[part, None] == index).double()
            d, h = (each[part, None].double() for each in self.upstream)
            total += ((d * (hit - logs.exp()) - h * logs.exp() * (logs + entropy)) / 0.9).T @ states[part]
        return total


def measure(device: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Run the rows in turns; return milliseconds, gigabytes beyond what is held, and the error of dW."""
    work = Pass(tokens, hidden, vocabulary, device)
    cuda = device == "cuda"
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    told: dict[str, Any] = {row: {} for row in ROWS}
    columns = slice(0, min(vocabulary, 4096))
    exact = work.exact(columns)
    for turn in range(TURNS + 1):
        for row in ROWS:
            if cuda:
                work.model.lm_head.weight.grad = work.hidden.grad = None
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begun = time.perf_counter()
            work.run(row)
            if cuda:
                torch.cuda.synchronize()
                told[row]["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            if turn:  # the first one compiles
                times[row].append(1000 * (time.perf_counter() - begun))
            gradient = work.model.lm_head.weight.grad
            assert gradient is not None
            told[row]["dW error"] = float((gradient[columns].double() - exact).norm() / exact.norm())
    for row in ROWS:
        told[row]["ms"] = statistics.median(times[row])
    told["ratio of time"] = told["chunked"]["ms"] / told["logits"]["ms"]
    return {"shape": [tokens, hidden, vocabulary], "kernels": work.tokens.used, **told}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=3_584)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (options.tokens, options.hidden, options.vocabulary) if device == "cuda" else (256, 64, 1000)
    result = measure(device, *sizes)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
