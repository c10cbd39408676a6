"""``warmup``: one step in this environment, so that the job's first step finds its kernels in the caches."""

from __future__ import annotations

import argparse
import time

from verl_fl_overlay.cli import model_folder, terminal
from verl_fl_overlay.cli.trial import has_accelerator, kernels_of, run_with_overlay
from verl_fl_overlay.compat.trial import Trial
from verl_fl_overlay.settings import Settings


def add(warmup: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "Triton compiles and tunes each kernel once for a chip and a shape, and keeps the result on disk. After this "
        "step, with the environment as the job will have it, the job's first step need not do that."
    )
    terminal.explain(
        warmup,
        more,
        examples=("verl-fl warmup MODEL", "verl-fl warmup MODEL --rows 4 --length 4096"),
        exits={0: "the step was run, or there is nothing to warm"},
    )
    warmup.add_argument("model", metavar="MODEL", help="a model's folder, Hugging Face format")
    model_folder.add_batch(warmup, rows=2, length=1024)
    warmup.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the step and say which kernels it used; on a CPU say that it uses none."""
    trial = Trial(options.model, options.rows, options.length, micro_batch=options.rows)
    trial = model_folder.checked(trial)
    if on_cpu := _on_cpu():
        print(f"nothing to warm: {on_cpu}, and a CPU computes without Triton's kernels; run warmup where training runs")
        return 0
    begun = time.perf_counter()
    with terminal.step(f"1/1 a step of {options.rows} sequences of up to {options.length} tokens"):
        used = kernels_of(run_with_overlay(trial))
    print(f"one step of {options.model} in {time.perf_counter() - begun:.0f} s: the kernels it needs are in the caches")
    print(f"  attention: {used['attention'].get('backends', {}) if 'attention' in used else 'off'}")
    print(f"  log-probs: {used['logprobs'].get('kernels', {}) if 'logprobs' in used else 'off'}")
    print(f"  fused modules: {used['fused'].get('checks', {}) if 'fused' in used else 'off'}")
    return 0


def _on_cpu() -> str:
    """Return why training here runs on the CPU, "" if it does not."""
    settings = Settings.from_environment()
    if settings.device == "cpu":
        return "VERL_FL_DEVICE=cpu"
    return "" if has_accelerator(settings) else "torch sees no accelerator here"
