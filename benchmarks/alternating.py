"""Steps of one model in one process, taken in turns: verl, the best native, the overlay's parts, Liger's modules.

python benchmarks/alternating.py [--model A] [--rounds 4]

Where the host's launches bound a step, two processes of one row differ by more than two rows do (benchmarks/step.py
shows it); in turns, all rows see the same machine.  On a CPU, or without Liger, only the rows that can run there do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import step
import torch


def rows(engine: Any, agreement: Any) -> dict[str, Callable[[], Any]]:
    """Return what makes each row of ``engine`` (its model is a Qwen2), from whatever row it was before."""
    from transformers.models.qwen2 import modeling_qwen2
    from verl.workers.engine.fsdp import transformer_impl

    from verl_fl_overlay.kernels.adam import FusedAdam
    from verl_fl_overlay.kernels.model import FusedModules
    from verl_fl_overlay.settings.variables import FUSED

    model, ours = engine.module, transformer_impl.logprobs_from_logits
    actor = transformer_impl.FSDPEngineWithLMHead
    outputs = vars(actor)["prepare_model_outputs"]
    # Liger replaces these in the file too, so they are kept here, and given back, by name.
    replaced = {name: getattr(modeling_qwen2, name) for name in ("Qwen2RMSNorm", "Qwen2MLP", "apply_rotary_pos_emb")}
    modules = [module for module in model.modules() if type(module) in replaced.values()]
    fused, adam = FusedModules(FUSED, agreement), FusedAdam(agreement)

    def reset(logprobs: Any = ours) -> None:
        fused.remove()
        adam.remove()
        for module in modules:
            vars(module).pop("forward", None)
        for name, native in replaced.items():
            setattr(modeling_qwen2, name, native)
        transformer_impl.logprobs_from_logits = logprobs
        actor.prepare_model_outputs = outputs if logprobs is ours else outputs.__wrapped__
        expect("transformers")

    def expect(package: str) -> None:
        """Check that this package's code is what the model runs on now: a row that did not apply has no time."""
        rotation = modeling_qwen2.apply_rotary_pos_emb  # the overlay leaves the function, and lets it run another one
        run = (rotation.__kwdefaults__ or {}).get("_run", rotation)
        found = {code.__module__.partition(".")[0] for code in (*(each.forward.__func__ for each in modules), run)}
        assert found == {package}, f"the model runs on {sorted(found)}, expected {package}"

    def overlay() -> None:
        reset()
        fused.fuse(model)
        expect("verl_fl_overlay")

    def liger() -> None:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        reset()
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, swiglu=True)
        modeling_qwen2.apply_rotary_pos_emb = liger_rotary_pos_emb
        expect("liger_kernel")

    made = {
        "verl": lambda: reset(ours.__wrapped__),
        "native": lambda: reset(step.vectorised),
        "log-probs only": reset,
    }
    if torch.cuda.is_available():
        made["overlay"] = lambda: (overlay(), adam.fuse(engine.optimizer))
        made["without adam"] = overlay
        if find_spec("liger_kernel"):
            made["liger"] = liger
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="A" if device == "cuda" else "tiny", choices=step.MODELS)
    parser.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="of five steps a row; one round more, and the first step of each, are not counted",
    )
    options = parser.parse_args()
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_FUSED": "0", "VERL_FL_STRICT": "1"}
    if device == "cpu":
        os.environ["VERL_FL_DEVICE"] = "cpu"
    import verl  # noqa: F401
    from real_engine import join_group, sft_loss

    join_group(False)
    times: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        step.write_model(Path(folder), step.MODELS[options.model], device)
        engine = step.engine(Path(folder), options.model, "overlay")
    from verl_fl_overlay.kernels.agreement import Agreement

    agreement = Agreement()
    made = rows(engine, agreement)
    for number in range(options.rounds + 1):
        for row, make in made.items():
            make()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for index in range(5):
                data = step.batch(options.model, device, seed=5 * number + index)
                begun = time.perf_counter()
                with engine.train_mode():
                    engine.train_batch(data, loss_function=sft_loss())
                if device == "cuda":
                    torch.cuda.synchronize()
                if number and index:
                    times.setdefault(row, []).append(1000 * (time.perf_counter() - begun))
            if device == "cuda":
                peaks[row] = torch.cuda.max_memory_allocated() / 1e9
    if device == "cuda":
        from verl_fl_overlay.activation import report
        from verl_fl_overlay.settings.variables import FUSED

        found = {**agreement.checks(), **report()["features"]["logprobs"]["detail"]["kernels"]}
        kinds = set(FUSED) - {"experts"}  # a Qwen2 has none
        used = kinds <= {name.split()[0] for name in found} and set(found.values()) == {"same", "triton"}
        assert used, f"not every kernel was used: {found}"
    medians = {row: statistics.median(found) for row, found in times.items()}
    print(f"model {options.model}")
    print(f"{'row':16}{'median ms':>10}{'least ms':>10}{'peak GB':>9}{'vs verl':>9}{'vs native':>10}")
    for row, median in medians.items():
        peak = f"{peaks[row]:.1f}" if row in peaks else "-"
        ratios = [f"{medians[base] / median:.2f}x" for base in ("verl", "native")]
        print(f"{row:16}{median:10.1f}{min(times[row]):10.1f}{peak:>9}{ratios[0]:>9}{ratios[1]:>10}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
