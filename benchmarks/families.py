"""Training steps of a few decoder layers of real widths, native and on the fused modules, in turns in one process.

python benchmarks/families.py [--families gemma2,qwen3_moe,...] [--rounds 3] [--json FILE]

A step is the forward and the backward of the layers on random tokens, in bf16, without a head, an optimizer or verl, so
that it shows what the modules are worth to a family and nothing else.  On a CPU a tiny model runs, natively in both
rows, so that this file cannot rot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from realistic import profiled

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {  # of 9B
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "attn_logit_softcapping": None,  # SDPA has none
        "num_hidden_layers": 4,
    },
    "qwen3_moe": {  # of 30B-A3B
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 3,
    },
    "glm4": {  # of 9B
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_hidden_layers": 4,
    },
    "cohere2": {  # of 7B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 4,
    },
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
}
STEPS = 5
"""Steps of a row in a round; the first one is not counted."""


def make_model(family: str, device: str) -> Any:
    from transformers import AutoConfig, AutoModel

    sizes = FAMILIES[family] if device == "cuda" else {name: TINY.get(name) for name in FAMILIES[family]}
    config = AutoConfig.for_model(family, vocab_size=1024, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.to(device, torch.bfloat16).train()


def stepper(model: Any, rows: int, length: int) -> Callable[[], torch.Tensor]:
    """Return what runs one step, which returns the last layer's result."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1024, (rows, length), generator=generator).to(model.device)
    upstream = torch.randn(rows, length, model.config.hidden_size, generator=generator).to(model.device, torch.bfloat16)

    def step() -> torch.Tensor:
        model.zero_grad()
        result = model(input_ids=ids, use_cache=False).last_hidden_state
        result.backward(upstream)
        return result.detach()  # type: ignore[no-any-return]

    return step


def measure(family: str, rounds: int, device: str) -> dict[str, Any]:
    """Return the figures of both rows, and what ran fused."""
    from verl_fl_overlay.kernels.agreement import Agreement
    from verl_fl_overlay.kernels.model import FusedModules
    from verl_fl_overlay.settings.variables import FUSED

    model = make_model(family, device)
    agreement = Agreement()
    fused = FusedModules(FUSED, agreement)
    step = stepper(model, *((8, 1024) if device == "cuda" else (2, 8)))
    makers = {"native": fused.remove, "overlay": lambda: (fused.remove(), fused.fuse(model))}
    if device != "cuda":
        makers["overlay"] = fused.remove  # there are no kernels for it
    found: dict[str, Any] = {row: {"steps ms": []} for row in makers}
    results = {}
    for number in range(rounds + 1):  # one more, to compile and to check
        for row, make in makers.items():
            make()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for index in range(STEPS):
                begun = time.perf_counter()
                results[row] = step()
                if device == "cuda":
                    torch.cuda.synchronize()
                if number and index:
                    found[row]["steps ms"].append(1000 * (time.perf_counter() - begun))
            if device == "cuda":
                found[row]["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    if device == "cuda":  # at the end, since a profiler slows down what runs after it
        for row, make in makers.items():
            make()
            step()
            found[row] |= profiled(step)
        assert fused.running == fused.counts, f"found {fused.counts}, running {fused.running}: {agreement.checks()}"
    for row in makers:
        found[row]["ms"] = statistics.median(found[row]["steps ms"])
    native, overlay = (results[row].float() for row in ("native", "overlay"))
    told = {"running": dict(fused.running), "checks": agreement.checks()}
    told["difference"] = float((native - overlay).norm() / native.norm())
    fused.remove()
    return {"rows": found, **told}


def table(family: str, told: dict[str, Any]) -> str:
    """Return both rows and their ratio as text."""
    lines = [f"{family}: {told['running']}, results differ by {told['difference']:.1e}"]
    lines.append(f"{'row':10}{'ms':>9}{'busy ms':>9}{'launches':>9}{'peak GB':>9}")
    keys = ("ms", "busy ms", "launches", "peak GB")
    rows = told["rows"]
    for row, each in rows.items():
        cells = [f"{each[key]:9.{0 if key == 'launches' else 1}f}" if key in each else f"{'-':>9}" for key in keys]
        lines.append(f"{row:10}{''.join(cells)}")
    native, overlay = rows["native"], rows["overlay"]
    ratios = [f"{native[key] / overlay[key]:8.2f}x" if key in native else f"{'-':>9}" for key in keys]
    return "\n".join([*lines, f"{'ratio':10}{''.join(ratios)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--rounds", type=int, default=3, help=f"of {STEPS} steps a row; one round more is not counted")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for family in options.families.split(","):
        results[family] = measure(family, options.rounds, device)
        print(table(family, results[family]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
