"""verl's real configuration: what a GRPO step costs in verl's FSDP2 engine, as verl is and with the overlay.

python benchmarks/realistic.py [--rows "padded,packed overlay"] [--turns N] [--steps N] [--folder F] [--json FILE]
python benchmarks/realistic.py --merge FILE...     prints the tables of earlier runs together

A model of Qwen2.5-1.5B's shape with random weights trains on 32 sequences of unequal length (with --size 0.5B on 512
short ones): dynamic batches of 16,384 tokens, gradient checkpointing, verl's own ppo_loss with KL.  Each row is a
process of its own, because two such engines do not fit on one card; the list of rows is run --turns times, and the
tables hold the medians of the processes.  A row that cannot run says so in one line, and so does a measure that does
not fit into the memory; the others go on.

On a CPU (or with --size tiny) a tiny model runs in the rows that need no flash-attn, in fp32, and the first step's loss
must be the same in all of them; the times there say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

STAND_IN = ROOT / "benchmarks" / "flash_attn_stand_in"
"""On PYTHONPATH in the rows named after flash-attn, if that package is not installed."""

LENGTHS = "attention.lengths"
"""The hooks that pass the sequences' lengths with the model's inputs."""

LOG_PROBS = "logprobs.fsdp,entropy.fsdp"
"""The hook on log-probs, which a row without the overlay leaves out on a CPU, where verl cannot do without the rest."""

SECONDS = 9
"""A measure takes no further step once its steps after the first have taken so long: steps of padded rows are slow."""

AUTO, UPDATES = "VERL_FL_RECOMPUTE=auto", 7
"""The setting, and the updates that it takes until it has found how many layers keep their activations."""

TOLERANCE = 1e-3
"""How far the first step's loss may be from the first row's on a CPU, relative to it."""


@dataclass(frozen=True)
class Row:
    """What is there and on: padded rows are sdpa, packed rows are flash_attention_2, verl's default."""

    what: str
    packed: bool = False
    flash_attn: bool = False
    overlay: bool = False
    liger: bool = False
    disabled: str = ""
    variable: str = ""


ROWS = {
    "padded": Row("verl as it is without flash-attn"),
    "padded overlay": Row("the same, overlay on", overlay=True),
    "packed flash-attn": Row("verl's defaults, flash-attn there", packed=True, flash_attn=True),
    "packed flash-attn liger": Row(
        "the same with use_liger and torch's fused Adam", packed=True, flash_attn=True, liger=True
    ),
    "packed flash-attn overlay": Row(
        "verl's defaults, flash-attn there, overlay on", packed=True, flash_attn=True, overlay=True
    ),
    "packed overlay": Row("verl's defaults, no flash-attn, overlay on", packed=True, overlay=True),
    **{
        f"packed overlay {name}": Row(f"the same, {variable}", packed=True, overlay=True, variable=variable)
        for name, variable in {
            "recompute none": "VERL_FL_RECOMPUTE=none",
            "recompute auto": AUTO,
            "head chunked": "VERL_FL_HEAD=chunked",
        }.items()
    },
    "packed overlay lengths not passed": Row(
        f"the same, VERL_FL_DISABLE={LENGTHS}", packed=True, overlay=True, disabled=LENGTHS
    ),
}

COMPARED = {
    ("packed overlay", "padded"): "train 7x",
    ("packed overlay", "packed flash-attn"): "",
    ("packed overlay", "packed flash-attn liger"): "",
    ("packed overlay", "packed overlay lengths not passed"): "",
    ("packed overlay recompute none", "packed overlay"): "",
    ("packed overlay recompute auto", "packed overlay"): "",
    ("packed overlay head chunked", "packed overlay"): "",
    ("packed overlay recompute none", "packed flash-attn"): "",
    ("packed overlay recompute none", "packed flash-attn liger"): "",
    ("packed flash-attn overlay", "packed flash-attn"): "",
    ("padded overlay", "padded"): "",
}
"""Which row is compared with which, and what was asked for."""


@dataclass(frozen=True)
class Size:
    """A Qwen2's sizes, and the batch: prompts of any length between two, responses log-normal up to the longest."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequences: int
    prompts: tuple[int, int]
    response: int
    longest: int
    tokens: int
    seed: int

    def lengths(self) -> list[tuple[int, int]]:
        """Return the length of each prompt and of its response."""
        numbers = random.Random(self.seed)
        prompts = [numbers.randint(*self.prompts) for _ in range(self.sequences)]
        mean = math.log(self.response) - SIGMA**2 / 2
        drawn = [round(numbers.lognormvariate(mean, SIGMA)) for _ in prompts]
        return [(prompt, min(max(number, 1), self.longest)) for prompt, number in zip(prompts, drawn, strict=True)]


SIGMA = 0.8
"""How widely the logarithms of the responses' lengths are spread."""

REAL = Size(1536, 8960, 28, 12, 2, 151936, 32, (256, 512), 900, 4096, tokens=16384, seed=17829)
"""Qwen2.5-1.5B's shape; with this seed 41,221 tokens, the longest sequence 3,838."""

SHORT = Size(896, 4864, 24, 14, 2, 151936, 512, (16, 120), 160, 640, tokens=16384, seed=5)
"""Qwen2.5-0.5B's shape and the short answers of benchmarks/grpo.py, 114,324 tokens: the host has more to do."""

TINY = Size(64, 128, 2, 4, 2, 512, 8, (4, 8), 12, 48, tokens=96, seed=0)

SIZES = {"1.5B": REAL, "0.5B": SHORT, "tiny": TINY}


def environment(name: str, tiny: bool) -> dict[str, str]:
    """Return the variables that make a row; on a CPU verl needs the overlay in every row."""
    row = ROWS[name]
    made = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "TRAINING_", "USE_FLAG"))}
    if row.flash_attn and not find_spec("flash_attn"):
        made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STAND_IN), made.get("PYTHONPATH", "")]))
    if not row.overlay and not tiny:
        return {**made, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    made |= {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
    if tiny:
        made |= {"VERL_FL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if row.variable:
        made |= dict([row.variable.split("=")])
    disabled = row.disabled if row.overlay else LOG_PROBS
    return {**made, **({"VERL_FL_DISABLE": disabled} if disabled else {})}


def write_model(folder: Path, size: Size) -> None:
    """Write the model, a Qwen2 whose head is its embedding."""
    import step
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    step.write_model(folder, size, device, max_position_embeddings=32768, tie_word_embeddings=True)


def write_elsewhere(folder: Path, size: Size) -> None:
    """Write the model in a process of its own, so that this one holds none of the GPU's memory while rows run."""
    writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(folder, size))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"the model could not be written to {folder}")


def batch(size: Size, *, packed: bool, entropy: bool, seed: int | None = None) -> Any:
    """Return what verl's trainer hands to the actor, on the host as there: random tokens, one advantage a response.

    The old and the reference log-probs are near those of a model that has learnt nothing, and the same in all rows.
    Another ``seed`` than the size's gives other tokens of the same lengths.
    """
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    lengths = size.lengths()
    generator = torch.Generator().manual_seed(size.seed if seed is None else seed)
    noise = partial(torch.randn, generator=generator)
    tokens = [torch.randint(0, size.vocabulary, (sum(both),), generator=generator) for both in lengths]
    responses = [response for _, response in lengths]
    untrained = -math.log(size.vocabulary)

    def nested(rows: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    return tu.get_tensordict(
        tensor_dict={
            "input_ids": nested(tokens),
            "position_ids": nested([torch.arange(len(row)) for row in tokens]),
            "prompts": nested([row[:prompt] for row, (prompt, _) in zip(tokens, lengths, strict=True)]),
            "responses": nested([row[prompt:] for row, (prompt, _) in zip(tokens, lengths, strict=True)]),
            "loss_mask": nested([torch.ones(response, dtype=torch.long) for response in responses]),
            "response_mask": nested([torch.ones(response, dtype=torch.long) for response in responses]),
            "old_log_probs": nested([untrained + 0.1 * noise(response) for response in responses]),
            "ref_log_prob": nested([untrained + 0.1 * noise(response) for response in responses]),
            "advantages": nested([noise(1).repeat(response) for response in responses]),
        },
        non_tensor_dict={
            "use_remove_padding": packed,
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": size.tokens,
            "temperature": 1.0,
            "global_batch_size": size.sequences,
            "calculate_entropy": entropy,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
        },
    )


def engine(
    folder: Path, row: Row, tiny: bool, *, strategy: str = "fsdp2", lr: float = 1e-6, fp32: bool = False, **more: Any
) -> Any:
    """Build verl's engine with verl's defaults; the tiny model computes in fp32, so that rows can be compared.

    ``more`` are fields of ``FSDPEngineConfig``.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    all_fp32 = {f"{kind}_dtype": "fp32" for kind in ("param", "reduce", "buffer")}
    built = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=str(folder),
            use_remove_padding=row.packed,
            use_liger=row.liger,
            override_config={} if row.packed else {"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            use_remove_padding=row.packed,
            use_no_sync_for_gradient_accumulation=False,  # as verl's trainers set it
            use_torch_compile=not tiny,  # that is for entropy, and needs a compiler on a CPU
            mixed_precision=all_fp32 if tiny or fp32 else None,
            **more,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=lr,
            total_training_steps=100,
            override_optimizer_config={"fused": True} if row.liger else None,
        ),
        checkpoint_config=CheckpointConfig(),
    )
    built.initialize()
    return built


def ppo_loss() -> Any:
    """Return verl's own loss of an actor, with KL and without a bonus for entropy."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss as loss

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, use_kl_loss=True, entropy_coeff=0)
    return partial(loss, config=config)


def check(name: str, module: Any, tiny: bool) -> None:
    """Check that the row is what it is named for: a row that is not has no time."""
    from verl.utils.torch_functional import FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE as FLASH_ATTN

    row = ROWS[name]
    homes = {getattr(part.forward, "__module__", "").partition(".")[0] for part in module.modules()}
    found = FLASH_ATTN, "verl_fl_overlay" in sys.modules, "liger_kernel" in homes
    expected = row.flash_attn, row.overlay or tiny, row.liger
    assert found == expected, f"flash-attn, overlay and Liger are {found}, expected {expected}"


def run_row(name: str, folder: Path, steps: int, of_size: str) -> dict[str, Any]:
    """Build the row's engine in this process; return what its steps and passes take, and what the first step gave."""
    row, size, tiny = ROWS[name], SIZES[of_size], of_size == "tiny"
    if not row.flash_attn and find_spec("flash_attn"):
        sys.modules["flash_attn"] = None  # type: ignore[assignment]  # it cannot be imported or found any more
    import torch
    import verl
    from real_engine import join_group

    join_group(False)
    device = "cpu" if tiny else "cuda"
    made, loss = engine(folder, row, tiny), ppo_loss()
    check(name, made.module, tiny)
    first: dict[str, float] = {}

    def train(data: Any) -> None:
        with made.train_mode():
            output = made.train_batch(data, loss_function=loss)
        if not first:
            first.update(loss=sum(output["loss"]), grad_norm=float(output["metrics"]["grad_norm"]))

    def infer(data: Any) -> None:
        with made.eval_mode():
            made.infer_batch(data, loss_function=None)

    if row.variable == AUTO:
        for _ in range(UPDATES):
            train(batch(size, packed=row.packed, entropy=False))
    # What may not fit comes after what does.
    calls: dict[str, Callable[[], None]] = {
        measure: partial(call, batch(size, packed=row.packed, entropy=entropy))
        for measure, call, entropy in (
            ("train", train, False),
            ("ref", infer, False),
            ("old", infer, True),
            ("train with entropy", train, True),
        )
    }
    results: dict[str, Any] = {measure: fitting(partial(timed, call, steps, device)) for measure, call in calls.items()}
    if device == "cuda":  # at the end, since a profiler slows down what runs after it
        for measure, call in calls.items():
            if "error" not in results[measure]:
                results[measure] |= fitting(partial(profiled, call))
    torch.distributed.destroy_process_group()
    lengths = [sum(both) for both in size.lengths()]
    return {
        **results,
        "first step": first,
        "batch": f"{len(lengths)} sequences, {sum(lengths):,} tokens, the longest {max(lengths):,}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "verl": verl.__version__}
        | ({"flash-attn": sys.modules["flash_attn"].__version__} if row.flash_attn else {}),
    }


def fitting(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``measure`` does, or that it does not fit into the memory, which is then given back."""
    try:
        return measure()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
    # Outside of the except: until here the exception holds the tensors of the step that failed.
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return {"error": "out of memory"}


def timed(call: Callable[[], None], steps: int, device: str) -> dict[str, Any]:
    """Return the median time of a step after the first two, or after the first, and the peak of the memory."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < min(2, steps) or (len(times) < steps and sum(times[1:]) < 1000 * SECONDS):
        begun = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return {
        "ms": statistics.median(times[2:] or times[1:] or times),
        "steps ms": times,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


def profiled(call: Callable[[], None]) -> dict[str, Any]:
    """Return for how long the GPU's kernels run in one step, and how many they are, copies and fills left out."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation  # verl and FSDP name spans of time
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return {"busy ms": sum(kernels) / 1000, "launches": len(kernels)}


def one_line(said: str) -> str:
    """Return what an error said as a cell of a table."""
    return textwrap.shorten(said.replace("|", "/"), 200, placeholder=" ...")


def child(what: str, folder: Path, steps: int, size: str) -> dict[str, Any]:
    """Run one row in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--steps", str(steps)]
    try:
        done = subprocess.run(
            [*command, "--size", size],
            env=environment(what, size == "tiny"),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"error": f"not done in {error.timeout:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.stderr.write(done.stderr)
        return {"error": one_line((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])}
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def median(runs: list[dict[str, Any]], measure: str, key: str) -> float | None:
    """Return the median of a figure over a row's processes; None if none of them has it."""
    found = [run[measure][key] for run in runs if run.get(measure, {}).get(key) is not None]
    return statistics.median(found) if found else None


def figure(runs: list[dict[str, Any]], key: str, measures: tuple[str, ...], digits: int = 0) -> str:
    """Return a cell of the table: a figure for each of ``measures``, or why there is none."""
    cells = []
    for measure in measures:
        value = median(runs, measure, key)
        errors = [run[measure]["error"] for run in runs if "error" in run.get(measure, {})]
        cells.append(f"{value:,.{digits}f}" if value is not None else (errors or ["-"])[0])
    return " / ".join(cells)


TRAIN, INFER = ("train", "train with entropy"), ("ref", "old")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| row | train ms | busy ms | launches | ref / old ms | peak GB | first step: loss, grad_norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, runs in results.items():
        done = [run for run in runs if "error" not in run]
        if not done:
            lines.append(f"| {row} | {runs[0]['error']} | | | | | |")
            continue
        cells = [
            figure(done, "ms", TRAIN),
            figure(done, "busy ms", TRAIN),
            figure(done, "launches", TRAIN),
            figure(done, "ms", INFER),
            figure(done, "peak GB", TRAIN, 1),
            ", ".join(f"{value:.6g}" for value in done[0].get("first step", {}).values()) or "-",
        ]
        lines.append(f"| {' | '.join([row, *cells])} |")
    return "\n".join(lines)


def ratios(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return how many times as much one row takes as another, as a table in Markdown."""
    lines = ["| row | against | train | busy | launches | ref / old | asked for |", "|---|---|---|---|---|---|---|"]
    for (row, base), asked in COMPARED.items():
        if row not in results or base not in results:
            continue

        def ratio(key: str, measures: tuple[str, ...], row: str = row, base: str = base) -> str:
            cells = []
            for measure in measures:
                ours, theirs = median(results[row], measure, key), median(results[base], measure, key)
                cells.append(f"{theirs / ours:.2f}x" if ours and theirs else "-")
            return " / ".join(cells)

        cells = [ratio("ms", TRAIN), ratio("busy ms", TRAIN), ratio("launches", TRAIN), ratio("ms", INFER)]
        lines.append(f"| {' | '.join([row, base, *cells, asked])} |")
    return "\n".join(lines)


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return both tables, and on what they were measured."""
    done = [run for runs in results.values() for run in runs if "error" not in run]
    about = {
        "on": sorted({run["device"] for run in done}),
        "with": sorted({f"{name} {version}" for run in done for name, version in run["versions"].items()}),
        "batch:": sorted({run["batch"] for run in done}),
    }
    said = "; ".join(f"{word} {', '.join(what)}" for word, what in about.items())
    counts = sorted({sum("error" not in run for run in runs) for runs in results.values()})
    processes = f"medians of {' or '.join(map(str, counts))} processes a row"
    return f"{said}\n{processes}; a / b: without / with entropy\n\n{table(results)}\n\n{ratios(results)}"


def refuse_several(found: list[str], parser: argparse.ArgumentParser) -> None:
    """End the program if the files of --merge are of several cards, or batches, whose times cannot be compared."""
    if len(found) > 1:
        parser.error(f"--merge: the files are of {' and of '.join(found)}; their times cannot be compared")


def disagreements(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the rows whose first step's loss is not the first row's, or that have none."""
    losses = {row: median(runs, "first step", "loss") for row, runs in results.items()}
    expected = next((loss for loss in losses.values() if loss is not None), None)
    return [
        f"{row}: the first step's loss is {loss}, expected {expected}"
        for row, loss in losses.items()
        if loss is None or expected is None or not math.isclose(loss, expected, rel_tol=TOLERANCE)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="of: " + "; ".join(f"{name}: {row.what}" for name, row in ROWS.items()))
    parser.add_argument("--turns", type=int, default=2, help="how often the list of rows is run, in fresh processes")
    parser.add_argument("--steps", type=int, default=8, help="of each measure at most; the first two are not counted")
    parser.add_argument("--size", choices=SIZES, help="of the model; default: 1.5B, and tiny without a GPU, on the CPU")
    parser.add_argument("--json", type=Path, help="write the results there, after each process")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="run nothing, print what --json wrote")
    parser.add_argument("--folder", type=Path, help="keep the model there, and take the one that is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        try:
            result = run_row(options.child, options.folder, options.steps, options.size)
        except Exception as error:
            traceback.print_exc()
            result = {"error": one_line(f"{type(error).__name__}: {error}")}
        print("RESULT " + json.dumps(result))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    if options.merge:
        for file in options.merge:
            for row, runs in json.loads(file.read_text()).items():
                results.setdefault(row, []).extend(runs)
        done = [run for runs in results.values() for run in runs if "error" not in run]
        for what in ("device", "batch"):
            refuse_several(sorted({run[what] for run in done}), parser)
        print(report(results))
        return

    import torch

    size = options.size or ("1.5B" if torch.cuda.is_available() else "tiny")
    tiny = size == "tiny"
    rows = [row for row in ROWS if not (tiny and ROWS[row].flash_attn)]
    if options.rows:
        rows = options.rows.split(",")
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / size
        if not folder.exists():
            write_elsewhere(folder, SIZES[size])
        for _ in range(options.turns):
            for row in rows:
                result = child(row, folder, options.steps, size)
                results.setdefault(row, []).append(result)
                print(table({row: [result]}).splitlines()[-1], flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))
    print(f"\n{report(results)}")
    wrong = disagreements(results) if tiny else []
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
