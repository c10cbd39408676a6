"""FlagGems routed in verl's real FSDP2 engine on a GPU, against the same engine without it: prints the table.

``python benchmarks/flaggems_routing.py [--json FILE]`` makes a small Qwen2 from a seed and runs two processes, native
and routed, on the same data.  Needs CUDA, verl and flag_gems.  Each row is also told on the error stream as soon as it
is measured, the figures so far are in FILE even when the run is cut, and a part that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "examples")]

OPERATORS = ["copy_", "to_copy", "mul", "add", "mm", "neg", "cat", "rsqrt", "pow_tensor_scalar", "mean_dim"]
MODEL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 8, "vocab_size": 8192}
ROWS, LENGTH, STEPS, NATIVE_STEPS = 4, 256, 200, 60


def batch(seed: int) -> Any:
    """Return rows of random tokens, as verl's trainers hand them to an engine."""
    import torch
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    generator = torch.Generator().manual_seed(seed)

    def nested(rows: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    return tu.get_tensordict(
        tensor_dict={
            "input_ids": nested([torch.randint(4, 128, (LENGTH,), generator=generator) for _ in range(ROWS)]),
            "loss_mask": nested([torch.ones(LENGTH, dtype=torch.long) for _ in range(ROWS)]),
            "position_ids": nested([torch.arange(LENGTH) for _ in range(ROWS)]),
        },
        non_tensor_dict={
            "use_remove_padding": False,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "temperature": 1.0,
            "global_batch_size": ROWS,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
        },
    )


def one_process(model: str, file: Path, native: dict[str, Any] | None) -> None:
    """Train one engine and measure, into ``file``; what differs between native and routed is the environment alone.

    ``native`` are the figures of the native process, if this is the routed one.
    """
    import torch
    import verl  # noqa: F401
    from real_engine import join_group, make_engine, sft_loss

    torch.manual_seed(0)
    begun = time.monotonic()
    join_group(plain=False)
    engine = make_engine(model, "fsdp2", "lm")
    _say("engine initialised")
    one_tiling_for_mm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = sft_loss()
    result: dict[str, Any] = {"failed": {}}

    def step(seed: int) -> dict[str, float]:
        with engine.train_mode():
            output = engine.train_batch(batch(seed).to(device), loss_function=loss)
            engine.lr_scheduler_step()
        return {
            "loss": sum(float(value) for value in output["loss"]),
            "grad_norm": float(output["metrics"]["grad_norm"]),
        }

    def infer() -> None:
        with engine.eval_mode():
            inferred = engine.infer_batch(batch(7).to(device), loss_function=None)["model_output"]["log_probs"]
        result["log_probs"] = [float(value) for value in inferred.values().float().flatten()]

    def three_steps() -> None:
        result["steps"] = [step(seed) for seed in range(3)]
        result["seconds_before_steps"] = time.monotonic() - begun

    def kernels() -> None:
        if device == "cuda":
            result["inside"] = kernels_of(lambda: step(3))
            result["outside"] = kernels_of(outside)

    parts: dict[str, Callable[[], None]] = {"log-probs": infer, "three steps": three_steps}
    parts["report"] = lambda: _describe(result)
    if native is not None:
        parts["entering and leaving"] = lambda: result.update(phase=_cost())
    parts["kernels"] = kernels
    steps = NATIVE_STEPS if native is None else STEPS
    parts[f"{steps} steps"] = lambda: _measure_steps(step, result, steps)
    parts["record"] = lambda: _describe(result)
    told: set[tuple[str, str]] = set()
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        _say(f"{name}: {result['failed'].get(name, 'done')}")
        file.write_text(json.dumps(result))
        for row, value in rows(compare(native, result)) if native is not None else ():
            if (row, value) not in told:
                _say(f"  {row}: {value}")
                told.add((row, value))
    torch.distributed.destroy_process_group()


def one_tiling_for_mm() -> None:
    """Let FlagGems' mm take one tiling instead of choosing among 216: compiling them all takes minutes."""
    if "flag_gems" not in sys.modules:
        return
    from verl_fl_overlay.flaggems import library

    mm = next(kernel.function for kernel in library.load().kernels if kernel.key == "mm")
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    for name, value in mm.__globals__.items():
        tuner = getattr(value, "fn", None)
        if name.startswith("mm_kernel") and hasattr(tuner, "configs"):
            tuner.configs = [c for c in tuner.configs if tiles.items() <= c.kwargs.items() and c.num_warps == 4][:1]
            _say(f"{name}: {len(tuner.configs)} tiling")


_BEGUN = time.monotonic()


def _say(what: str) -> None:
    """Tell on the error stream how far the run is."""
    print(f"[{time.monotonic() - _BEGUN:6.1f} s] {what}", file=sys.stderr, flush=True)


def outside() -> None:
    """Multiply, multiply matrices and copy, where verl does not train."""
    import torch

    a = torch.rand(512, 512, device="cuda", dtype=torch.bfloat16)
    torch.empty_like(a).copy_((a * a @ a).t())


def kernels_of(run: Any) -> dict[str, int]:
    """Return the GPU kernels that ``run`` launches: name -> how often."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    found: dict[str, int] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] = found.get(event.name, 0) + 1
    return found


def _measure_steps(step: Any, result: dict[str, Any], steps: int) -> None:
    import torch

    def memory() -> dict[str, int]:
        on_gpu = torch.cuda.is_available()
        return {
            "allocated": torch.cuda.memory_allocated() if on_gpu else 0,
            "reserved": torch.cuda.memory_reserved() if on_gpu else 0,
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    times = []
    for number in range(steps):
        begun = time.perf_counter()
        step(number)
        times.append((time.perf_counter() - begun) * 1e3)
        if number == 19:
            result["memory_after_20"] = memory()
    result["memory_at_end"] = memory()
    result["step_ms"] = statistics.median(times[20:])


def _describe(result: dict[str, Any]) -> None:
    from verl_fl_overlay.activation import report as build

    built = build()
    result["report"] = built["features"]["flaggems"]
    result["problems"] = built["problems"]
    result["versions"] = {"torch": built["torch"], "verl": built["verl"]["version"]}
    detail = result["report"].get("detail")
    if not detail:
        return
    record = Path(detail["record"])
    if record.exists():
        result["record"] = {line.split()[1]: int(line.split()[0]) for line in record.read_text().splitlines()[1:]}


def _cost() -> dict[str, Any]:
    """Return how long it takes to enter and leave, with 40 operators and with all, in milliseconds."""
    from verl_fl_overlay.flaggems import library
    from verl_fl_overlay.flaggems.choice import select
    from verl_fl_overlay.flaggems.routing import Router
    from verl_fl_overlay.settings import Settings

    kernels = select(Settings.of(ops=("all",)), library.load()).kernels
    measured = {}
    for name, chosen in {"40": kernels[:40], "all": kernels}.items():
        router = Router(chosen)
        enter, leave = [], []
        for _ in range(200):
            begun = time.perf_counter()
            router.enter()
            entered = time.perf_counter()
            router.leave()
            leave.append(time.perf_counter() - entered)
            enter.append(entered - begun)
        measured[name] = {
            "operators": len(chosen),
            "enter_ms": statistics.median(enter) * 1e3,
            "leave_ms": statistics.median(leave) * 1e3,
            "failed": router.failed,
        }
    return measured


def child(model: Path, folder: Path, routed: bool) -> None:
    """Run one process; its log goes to our error stream, its figures to native.json or routed.json."""
    name = "routed" if routed else "native"
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
        "VERL_FL_STRICT": "1",
        "HF_HUB_OFFLINE": "1",
        # Triton kernels of the overlay's own would be counted as FlagGems'.
        "VERL_FL_FUSED": "0",
        "VERL_FL_DISABLE": "logprobs.fsdp,entropy.fsdp",
        "USE_FLAGGEMS": "1" if routed else "0",
        "FLAGGEMS_CACHE_DIR": str(folder / "flaggems"),
    }
    command = [sys.executable, __file__, "--child", str(model), "--json", str(folder / f"{name}.json")]
    if routed:
        environment["TRAINING_FL_FLAGOS_WHITELIST"] = ",".join(OPERATORS)
        environment["TRAINING_FLAGGEMS_PATH"] = str(folder / "record.txt")
        command += ["--native", str(folder / "native.json")]
    _say(f"{name}:")
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)


def units_in_the_last_place(found: list[float], expected: list[float]) -> list[float]:
    """Return the distances in units of bf16's last place (7 bits after the leading one) at the expected value."""
    return [
        abs(a - b) / 2.0 ** (math.floor(math.log2(max(abs(b), 2.0**-14))) - 7)
        for a, b in zip(found, expected, strict=True)
    ]


def compare(native: dict[str, Any], routed: dict[str, Any]) -> dict[str, Any]:
    """Return the figures, those that both processes have so far."""
    found: dict[str, Any] = {"native": native, "routed": routed}
    if "log_probs" in native and "log_probs" in routed:
        units = units_in_the_last_place(routed["log_probs"], native["log_probs"])
        found |= {"tokens": len(units), "log_probs_largest_units": max(units)}
        found["log_probs_mean_units"] = sum(units) / len(units)
    if "steps" in native and "steps" in routed:
        pairs = zip(routed["steps"], native["steps"], strict=True)
        found["grad_norm_apart_percent"] = 100 * max(abs(r["grad_norm"] / n["grad_norm"] - 1) for r, n in pairs)
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table's rows, those whose figures are there."""
    native, routed = found["native"], found["routed"]
    lines = []
    if "tokens" in found:
        value = f"{found['tokens']} tokens, at most {found['log_probs_largest_units']:.2f} units in the last place of "
        lines.append(("log-probs against native", f"{value}bf16, mean {found['log_probs_mean_units']:.3f}"))
    if "grad_norm_apart_percent" in found:
        lines.append(("grad_norm against native", f"at most {found['grad_norm_apart_percent']:.3f} % apart in 3 steps"))
    if detail := routed.get("report", {}).get("detail"):
        value = f"{detail['operators']} aten keys of {len(OPERATORS)} functions ({detail['source']})"
        lines.append(("operators routed", value))
    for phase in routed.get("phase", {}).values():
        value = f"{phase['enter_ms']:.2f} / {phase['leave_ms']:.2f} ms, {len(phase['failed'])} failed"
        lines.append((f"entering / leaving, {phase['operators']} operators", value))
    if "outside" in native and "outside" in routed:
        inside = f"{triton_kernels(routed['inside'])} routed, {triton_kernels(native['inside'])} native"
        lines.append(("Triton kernels in one step", inside))
        lines.append(("Triton kernels outside the phase", str(triton_kernels(routed["outside"]))))
    if "memory_at_end" in routed:
        early, late = routed["memory_after_20"], routed["memory_at_end"]
        value = ", ".join(f"{name} {late[name] - early[name]:+d} bytes" for name in late)
        lines.append((f"memory, step 20 to {STEPS}", value))
        if "step_ms" in native:
            value = f"{native['step_ms']:.1f} / {routed['step_ms']:.1f} ms (medians)"
            lines.append(("step, native / routed", value))
        if record := routed.get("record"):
            calls = ", ".join(f"{key.removeprefix('aten::')} {count}" for key, count in list(record.items())[:6])
            lines.append(("calls of FlagGems recorded", f"{sum(record.values())} in the run: {calls}"))
    return lines


def table(found: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    routed = found["routed"]
    versions = routed.get("versions", {})
    flag_gems = routed.get("report", {}).get("detail", {}).get("version")
    head = f"verl {versions.get('verl')} FSDP2, torch {versions.get('torch')}, flag_gems {flag_gems}"
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows(found))])


def triton_kernels(kernels: dict[str, int]) -> int:
    """Return how many of the launches are FlagGems': Triton's kernels have plain names, CUDA's are mangled or known."""
    return sum(count for name, count in kernels.items() if is_triton(name))


def is_triton(name: str) -> bool:
    """Tell a Triton kernel by its name, which is that of a Python function."""
    known = ("nvjet", "cutlass", "ampere", "sm80", "sm90", "cublas", "nccl", "flash", "pytorch_flash", "fmha", "gemm")
    known += ("cudnn", "micro_batch")  # cuDNN's attention; verl's own marks of its micro-batches are no kernels
    return name.isidentifier() and not name.lower().startswith(known) and not name.startswith("_Z")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--native", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        one_process(options.child, options.json, json.loads(options.native.read_text()) if options.native else None)
        return 0
    from arithmetic import write_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was measured is written, the child ended
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model", **MODEL)
        try:
            for routed in (False, True):
                child(folder / "model", folder, routed)
        finally:
            native, routed_figures = (_read(folder / f"{name}.json") for name in ("native", "routed"))
            found = compare(native, routed_figures)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
            print(table(found), flush=True)
    return 1 if native["failed"] or routed_figures["failed"] else 0


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


if __name__ == "__main__":
    raise SystemExit(main())
