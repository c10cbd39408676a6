"""Whole training steps of verl's real FSDP2 engine, with and without the overlay, each row in a process of its own.

python benchmarks/step.py [--models A,B] [--rows native,overlay,...] [--json FILE]
The first row of the overlay starts with empty caches if TRITON_CACHE_DIR names an empty folder.

On a CPU (or with --tiny) a tiny model runs, so that this file cannot rot; its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]


@dataclass(frozen=True)
class Model:
    """A Qwen2's sizes and the batch that a step of it trains on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    length: int
    micro_batch: int


MODELS = {
    "A": Model(896, 4864, 24, 14, 2, 151936, rows=8, length=1024, micro_batch=4),
    "B": Model(2048, 8192, 12, 16, 4, 151936, rows=8, length=2048, micro_batch=4),
    "tiny": Model(64, 128, 2, 4, 2, 512, rows=4, length=32, micro_batch=2),
}

ROWS = {
    "verl": "verl as it is there, without flash-attn: log-probs one row at a time",
    "native": "verl, log-probs vectorised in fp32 and nothing else changed",
    "overlay": "overlay on, defaults",
    "overlay again": "the same in a second process: caches are warm",
    "log-probs only": "overlay on, VERL_FL_FUSED=0",
    "liger": "overlay on, the modules Liger's (use_liger)",
    "all ops": "overlay on, every operator from FlagGems (USE_FLAGGEMS=1 VERL_FL_OPS=all): minutes of tuning",
}
DEFAULT_ROWS = [row for row in ROWS if row != "all ops"]
NEED_A_GPU = ("liger", "all ops")


def environment(row: str, tiny: bool) -> dict[str, str]:
    """Return the variables that make ``row``; on a CPU verl needs the overlay in every row."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "TRAINING_", "USE_FLAG"))}
    without = row in ("verl", "native")
    overlay = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
    if tiny:
        on_cpu = {"VERL_FL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {**kept, **overlay, **on_cpu, **({"VERL_FL_DISABLE": "logprobs.fsdp,entropy.fsdp"} if without else {})}
    if without:
        return {**kept, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    more = {"log-probs only": {"VERL_FL_FUSED": "0"}, "all ops": {"USE_FLAGGEMS": "1", "VERL_FL_OPS": "all"}}
    return {**kept, **overlay, **more.get(row, {})}


def configuration(size: Any, **more: Any) -> Any:
    """Return a Qwen2's configuration.

    ``size`` has the sizes of ``Model`` up to the vocabulary; ``more`` are fields of the configuration.
    """
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        **{"max_position_embeddings": 4096, "tie_word_embeddings": False, **more},
    )


def write_model(folder: Path, size: Any, device: str, **more: Any) -> None:
    """Write a Qwen2 with random weights in bf16; ``size`` and ``more`` are those of ``configuration``."""
    import torch
    from arithmetic import tokenizer
    from transformers import Qwen2ForCausalLM

    config = configuration(size, dtype=torch.bfloat16, **more)
    torch.manual_seed(0)
    with torch.device(device):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def batch(name: str, device: str, seed: int) -> Any:
    """Return rows of random tokens of one length, every token of which is trained on."""
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    model = MODELS[name]
    generator = torch.Generator().manual_seed(seed)

    def nested(row: Any) -> Any:
        return torch.nested.as_nested_tensor([row().to(device) for _ in range(model.rows)], layout=torch.jagged)

    return tu.get_tensordict(
        tensor_dict={
            "input_ids": nested(lambda: torch.randint(0, model.vocabulary, (model.length,), generator=generator)),
            "loss_mask": nested(lambda: torch.ones(model.length, dtype=torch.long)),
            "position_ids": nested(lambda: torch.arange(model.length)),
        },
        non_tensor_dict={
            "use_remove_padding": False,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": model.micro_batch,
            "temperature": 1.0,
            "global_batch_size": model.rows,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
        },
    )


def vectorised(logits: Any, labels: Any, inplace_backward: bool = True) -> Any:
    """Be the best that torch's own operators give: the whole matrix in fp32 at once."""
    import torch

    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def engine(folder: Path, name: str, row: str) -> Any:
    """Build verl's engine for the model in ``folder``."""
    from real_engine import configs
    from verl.workers.engine import EngineRegistry

    made = configs(str(folder), "fsdp2", "lm", micro_batch_size_per_gpu=MODELS[name].micro_batch)
    if row == "liger":
        object.__setattr__(made["model_config"], "use_liger", True)  # a frozen configuration
    built = EngineRegistry.new(model_type="language_model", backend="fsdp2", **made)
    built.initialize()
    return built


def run_row(row: str, names: list[str], models: Path, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps on each model; return times, memory and what the steps computed."""
    begun = time.perf_counter()
    import torch
    import verl  # noqa: F401
    from real_engine import join_group, sft_loss

    join_group(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if row == "native":
        from verl.workers.engine.fsdp import transformer_impl

        transformer_impl.logprobs_from_logits = vectorised
    results: dict[str, Any] = {"imports s": time.perf_counter() - begun}
    for name in names:
        begun = time.perf_counter()
        made = engine(models / name, name, row)
        built = time.perf_counter() - begun
        times, outputs = [], []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(steps):
            data = batch(name, device, seed=number)
            begun = time.perf_counter()
            with made.train_mode():
                output = made.train_batch(data, loss_function=sft_loss())
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begun))
            outputs.append({"loss": sum(output["loss"]), "grad_norm": float(output["metrics"]["grad_norm"])})
        results[name] = {
            "initialize s": built,
            "first step s": times[0] / 1000,
            "step ms": statistics.median(times[2:] or times),
            "steps ms": times,
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
            "steps": outputs,
        }
        del made
        gc.collect()  # an engine refers to itself, and the next model's peak is not to hold this one
        if device == "cuda":
            torch.cuda.empty_cache()
    if "verl_fl_overlay" in sys.modules:
        from verl_fl_overlay.activation import report as build

        told = build()["features"]
        results["overlay"] = {feature: told[feature].get("detail") for feature in ("logprobs", "fused", "flaggems")}
    torch.distributed.destroy_process_group()
    return results


def table(results: dict[str, Any], names: list[str]) -> str:
    """Return the results as text: times, ratios to two rows, peak memory."""
    lines = []
    for name in names:
        lines += [
            f"model {name}",
            f"{'row':16}{'step ms':>10}{'init s':>8}{'first s':>9}{'peak GB':>9}{'vs verl':>9}{'vs native':>10}",
        ]
        for row, result in results.items():
            if name not in result:
                lines.append(f"{row:16}{result.get('error', 'not run')}")
                continue
            one = result[name]
            ratios = [
                f"{results[base][name]['step ms'] / one['step ms']:.2f}x" if name in results.get(base, {}) else "-"
                for base in ("verl", "native")
            ]
            peak = f"{one['peak GB']:.1f}" if one["peak GB"] else "-"
            lines.append(
                f"{row:16}{one['step ms']:10.1f}{one['initialize s']:8.1f}{one['first step s']:9.1f}"
                f"{peak:>9}{ratios[0]:>9}{ratios[1]:>10}"
            )
    return "\n".join(lines)


def child(row: str, names: list[str], models: Path, steps: int, tiny: bool) -> dict[str, Any]:
    """Run one row in a process of its own."""
    command = [sys.executable, __file__, "--child", row, "--models", ",".join(names), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--folder", str(models)],
        env=environment(row, tiny),
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"error": "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])}
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="A,B", help="of A, B, tiny")
    parser.add_argument(
        "--rows", default=",".join(DEFAULT_ROWS), help="of: " + "; ".join(f"{k}: {v}" for k, v in ROWS.items())
    )
    parser.add_argument("--steps", type=int, default=7, help="the median leaves out the first two")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU; the default without a GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the models there, and take those that are there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT " + json.dumps(run_row(options.child, options.models.split(","), options.folder, options.steps)))
        return

    import torch

    tiny = options.tiny or not torch.cuda.is_available()
    names = ["tiny"] if tiny else options.models.split(",")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in names:
            if not (folder / name).exists():
                write_model(folder / name, MODELS[name], "cpu" if tiny else "cuda")
        for row in options.rows.split(","):
            if tiny and row in NEED_A_GPU:
                continue
            results[row] = child(row, names, folder, options.steps, tiny)
            print(table({row: results[row]}, names), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(f"\n{table(results, names)}")


if __name__ == "__main__":
    main()
