"""verl's engines on two GPUs of one host: the numbers of plain verl with the overlay on, times, memory, scaling.

python benchmarks/ranks.py [--only numbers|scaling] [--configurations fsdp2,tp2] [--steps N] [--minutes M] [--json FILE]
python benchmarks/ranks.py --merge FILE...     prints the tables of earlier runs together

Numbers: each configuration trains a small Qwen2 (ep2: a small Qwen3-MoE) from fixed weights, a batch of sequences of
unequal length a step, which verl's own balancing gives to the ranks; verl's ppo_loss with KL; bf16.  Loss and grad_norm
of every step with the overlay are compared with plain verl's, within the bound that ``bounds`` derives.

Scaling: FSDP2 trains a model of Qwen2.5-1.5B's shape on one GPU, and on two with the same batch and with twice of it.

Plain verl packs for its FSDP engines with flash_attn_stand_in, torch's own FlashAttention, and for Megatron, which has
no TransformerEngine here, with a dense mask in megatron-core's own attention (tests/gpu/megatron_engine.py): a plain
time of Megatron is no time of verl's.  With the overlay there is no flash-attn.

The configurations that share a torchrun are built one after the other in the same processes.  One that fails, or is not
done in minutes, ends them; it says so in one line, and the others go on in new ones.  ``--only numbers`` and ``--only
scaling`` take some minutes each.  Without two GPUs tiny models run in fp32 on two CPU ranks over gloo, where verl needs
the overlay's device and, for Ulysses, its attention; plain verl pads there and has none of the overlay's other hooks.
The times of it mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import realistic
from realistic import REAL, ROWS, TINY, Size, refuse_several

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "megatron")]

SMALL = Size(896, 4864, 8, 14, 2, 32768, 16, (64, 128), 300, 1024, tokens=2048, seed=17829)
"""Eight layers of Qwen2.5-0.5B's shape.  Few tokens a micro-batch: plain Megatron's mask is tokens x tokens a head."""

UNCOUNTED = 3
"""Steps before those of which the median is taken."""

SILENCE = 170.0
"""Seconds in which processes must finish a configuration."""

LOSS, GRAD_NORM = 1e-2, 5e-2
"""The widest bounds in bf16, of the largest loss and of each grad_norm."""

WITH_EXPERTS = 1e-1
"""The widest bound of grad_norm with experts: a router that is rounded otherwise gives a token to other experts."""

EXACT = 1e-4
"""Both bounds in fp32, where only the order of additions differs."""

LEARNING = 1e-4
"""The learning rate: after 20 steps a wrong gradient is to be seen in the loss."""


@dataclass(frozen=True)
class Configuration:
    """An engine of verl's, and which processes build it: those of a family share a torchrun.

    ``twice``: each rank trains on a batch as large as that of one GPU; else the ranks share one.
    """

    family: str
    strategy: str
    engine: dict[str, Any] = field(default_factory=dict)
    size: Size = SMALL
    ranks: int = 2
    twice: bool = False
    fp32: bool = False
    experts: bool = False

    @property
    def scaling(self) -> bool:
        return self.size is REAL

    def small(self) -> Configuration:
        """Return what runs on a CPU in its place."""
        return replace(self, size=TINY)


FSDP, MEGATRON = partial(Configuration, "fsdp"), partial(Configuration, "megatron", "megatron")

CONFIGURATIONS = {
    "fsdp2 in fp32": FSDP("fsdp2", fp32=True),
    "fsdp2": FSDP("fsdp2"),
    "hsdp": FSDP("fsdp2", {"fsdp_size": 1}),  # verl's HSDP: fewer ranks share a model than there are
    "fsdp1": FSDP("fsdp"),
    "ulysses": FSDP("fsdp2", {"ulysses_sequence_parallel_size": 2}),
    "dp2 in fp32": MEGATRON(fp32=True),
    "dp2": MEGATRON(),
    "tp2": MEGATRON({"tensor_model_parallel_size": 2}),
    "pp2": MEGATRON({"pipeline_model_parallel_size": 2}),
    "ep2 in fp32": MEGATRON({"expert_model_parallel_size": 2}, experts=True, fp32=True),
    "ep2": MEGATRON({"expert_model_parallel_size": 2}, experts=True),
    "one GPU": Configuration("one", "fsdp2", size=REAL, ranks=1),
    "two GPUs, same batch": Configuration("two", "fsdp2", size=REAL),
    "two GPUs, twice the batch": Configuration("two", "fsdp2", size=REAL, twice=True),
}

MODES = ("plain", "overlay")

NOT_PLAIN = f"{realistic.LOG_PROBS},{realistic.LENGTHS},attention.lengths_on_host,attention.megatron," + ",".join(
    f"megatron.{hook}" for hook in ("layers", "norm", "weight_names")
)
"""The hooks that plain verl on a CPU does without."""


def environment(mode: str, configuration: Configuration, tiny: bool) -> dict[str, str]:
    """Return the variables of the processes that train so."""
    plain = "padded" if tiny or configuration.strategy == "megatron" else "packed flash-attn"
    made = realistic.environment(plain if mode == "plain" else "packed overlay", tiny)
    made |= {"NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false"}
    if tiny:
        made |= {"OMP_NUM_THREADS": "1"}
        return made | ({"VERL_FL_DISABLE": NOT_PLAIN, "VERL_FL_FUSED": "0"} if mode == "plain" else {})
    allowed = made.get("CUDA_VISIBLE_DEVICES") or "0,1"
    return made | {"CUDA_VISIBLE_DEVICES": ",".join(allowed.split(",")[: configuration.ranks])}


# ---- In the ranks


def engine(folder: Path, configuration: Configuration, mode: str, tiny: bool) -> Any:
    """Build the engine; on a CPU plain verl pads, where it can."""
    if configuration.strategy == "megatron":
        import megatron_engine

        fields = {"use_dynamic_bsz": True, **configuration.engine}
        return megatron_engine.make_engine(
            str(folder), engine=fields, float32=configuration.fp32 or tiny, lr=LEARNING, local=mode == "plain"
        )
    made = realistic.engine(
        folder,
        replace(ROWS["packed overlay"], packed=packed(configuration, mode, tiny)),
        tiny,
        strategy=configuration.strategy,
        lr=1e-6 if configuration.scaling else LEARNING,
        fp32=configuration.fp32,
        **configuration.engine,
    )
    if not tiny:
        realistic.check("packed flash-attn" if mode == "plain" else "packed overlay", made.module, tiny)
    return made


def packed(configuration: Configuration, mode: str, tiny: bool) -> bool:
    """Return whether sequences are packed: plain verl packs with flash-attn, which needs a GPU and bf16."""
    needs_no_packing = (
        configuration.strategy != "megatron" and "ulysses_sequence_parallel_size" not in configuration.engine
    )
    return not (needs_no_packing and mode == "plain" and (tiny or configuration.fp32))


def share(configuration: Configuration, step: int, rank: int, ranks: int, **more: Any) -> tuple[Any, int]:
    """Return what one of the data-parallel ``ranks`` trains on in a step, and the tokens of all of them."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    size = configuration.size
    if not configuration.scaling:
        size = replace(size, seed=size.seed + step)
    lengths = [sum(both) for both in size.lengths()]
    seed = 1000 * step + (rank if configuration.twice else 0)
    data = realistic.batch(size, entropy=False, seed=seed, **more)
    if configuration.twice:
        tu.assign_non_tensor(data, global_batch_size=ranks * len(lengths))
        return data, ranks * sum(lengths)
    chosen = get_seqlen_balanced_partitions(lengths, ranks, equal_size=True)[rank]
    return tu.index_select_tensor_dict(data, chosen), sum(lengths)


def train(made: Any, configuration: Configuration, steps: int, **more: Any) -> dict[str, Any]:
    """Train; return each step's time, tokens, loss (the mean over the data-parallel ranks) and grad_norm."""
    import torch

    cuda = torch.cuda.is_available()
    loss, told, times, tokens = realistic.ppo_loss(), [], [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        rank, ranks = made.get_data_parallel_rank(), made.get_data_parallel_size()
        data, together = share(configuration, step, rank, ranks, **more)
        tokens.append(together)
        torch.distributed.barrier()
        begun = time.perf_counter()
        with made.train_mode():
            output = made.train_batch(data, loss_function=loss)
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
        if made.is_mp_src_rank_with_outputs():  # the one of those ranks that share a model which gets the numbers
            told.append((sum(map(float, output["loss"])), float(output["metrics"]["grad_norm"])))
    mine = {"told": told, "ms": times, "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None}
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    numbers = [each["told"] for each in every if each["told"]]
    return {
        "loss": [statistics.fmean(loss for loss, _ in step) for step in zip(*numbers, strict=True)],
        "grad_norm": [max(norm for _, norm in step) for step in zip(*numbers, strict=True)],
        "steps ms": [max(step) for step in zip(*(each["ms"] for each in every), strict=True)],
        "tokens": tokens,
        "peak GB": [each["peak GB"] for each in every],
    }


def destroy(configuration: Configuration) -> float:
    """Give back what an engine held, to which no name refers any more; return the GB that are held nevertheless."""
    import torch

    if configuration.strategy == "megatron":
        from megatron.core import mpu

        mpu.destroy_model_parallel()
    gc.collect()  # an engine refers to itself
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 1e9


def run(names: list[str], folder: Path, results: Path, mode: str, steps: int, tiny: bool) -> None:
    """Be one rank: train the configurations; rank 0 writes what came of each as soon as it has it."""
    import torch
    import verl
    from real_engine import join_group

    if tiny:
        torch.set_num_threads(1)
    join_group(False)
    first, made, before = torch.distributed.get_rank() == 0, None, None
    for name in names:
        configuration = CONFIGURATIONS[name].small() if tiny else CONFIGURATIONS[name]
        limit = threading.Timer(SILENCE, die, [results, f"not done in {SILENCE:.0f} s"])
        limit.daemon = True
        limit.start()
        begun = time.perf_counter()
        same = before is not None and replace(before, twice=False) == replace(configuration, twice=False)
        if not same:
            made = None
            held = destroy(before or configuration)
            made = engine(model_folder(folder, configuration), configuration, mode, tiny)
        assert ("verl_fl_overlay" in sys.modules) == (mode == "overlay" or tiny), "the overlay is where it is not to be"
        built, before = time.perf_counter() - begun, configuration
        told = train(made, configuration, steps, packed=packed(configuration, mode, tiny))
        limit.cancel()
        if first:
            about = {
                "device": "cpu" if tiny else torch.cuda.get_device_name(),
                "versions": {"torch": torch.__version__, "verl": verl.__version__, **report_of_overlay()},
            }
            write(results / f"{name}.json", {**told, "initialize s": built, "held GB": held, **about})
    torch.distributed.destroy_process_group()


def report_of_overlay() -> dict[str, str]:
    """Return the overlay's version, where it is."""
    module = sys.modules.get("verl_fl_overlay")
    return {"verl-fl-overlay": module.__version__} if module else {}


def die(results: Path, why: str) -> None:
    """Write down why, and end this rank whatever its threads wait for; torchrun then ends the other one."""
    (results / f"{os.environ['RANK']}.error").write_text(why)
    faulthandler.dump_traceback()
    sys.stdout.flush()
    os._exit(1)


def write(file: Path, told: dict[str, Any]) -> None:
    """Write a file that is whole from the moment at which it is there."""
    file.with_suffix(".part").write_text(json.dumps(told))
    file.with_suffix(".part").rename(file)


# ---- In the process that starts them


def model_folder(folder: Path, configuration: Configuration) -> Path:
    size = configuration.size
    return folder / f"{size.hidden}-{size.layers}{'-experts' if configuration.experts else ''}"


def together(names: list[str], mode: str, folder: Path, steps: int, tiny: bool, until: float) -> dict[str, Any]:
    """Train the configurations of a family; return what came of each, or why nothing did."""
    found: dict[str, Any] = {}
    while left := [name for name in names if name not in found]:
        if time.monotonic() > until:
            return found | {name: {"error": "not run: no time was left"} for name in left}
        done, said = torchrun(left, mode, folder, steps, tiny, until)
        found |= done
        if failed := next((name for name in left if name not in done), None):
            found[failed] = {"error": said}
    return found


def torchrun(
    names: list[str], mode: str, folder: Path, steps: int, tiny: bool, until: float
) -> tuple[dict[str, Any], str]:
    """Start the ranks; return what came of the configurations that they finished, and what the last one died of."""
    configuration = CONFIGURATIONS[names[0]]
    with tempfile.TemporaryDirectory() as place:
        results = Path(place)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={configuration.ranks}", __file__, "--child", mode, "--results", place]
        command += ["--configurations", ";".join(names), "--folder", str(folder), "--steps", str(steps)]
        with (results / "output").open("w+") as output:
            processes = subprocess.Popen(
                [*command, *(["--tiny"] if tiny else [])],
                env=environment(mode, configuration, tiny),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            said = ""
            try:
                processes.wait(timeout=max(until - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                said = "not done when the time was over"
                processes.terminate()  # torchrun then ends the ranks
                processes.wait()
            output.seek(0)
            text = output.read()
        done = {name: json.loads(file.read_text()) for name in names if (file := results / f"{name}.json").exists()}
        errors = [file.read_text() for file in sorted(results.glob("*.error"))]
    if len(done) < len(names):
        sys.stderr.write(text[-6000:])
        said = said or (errors or [f"exit status {processes.returncode}"])[0]
    return done, realistic.one_line(said)


def bounds(results: dict[str, dict[str, Any]], name: str, tiny: bool) -> tuple[float, float]:
    """Return by how much loss and grad_norm may differ from plain verl's.

    What bf16 does to plain verl's own numbers is measured: each of the family's configurations is compared with fp32.
    Two computations that are both so near to the right numbers are at most twice as far from each other.  ``LOSS`` and
    ``GRAD_NORM``, or ``WITH_EXPERTS``, hold where that is wider, or was not measured.
    """
    if tiny:
        return EXACT, EXACT
    noise = rounding(results, CONFIGURATIONS[name])
    widest = WITH_EXPERTS if CONFIGURATIONS[name].experts else GRAD_NORM
    return (min(LOSS, 2 * noise[0]), min(widest, 2 * noise[1])) if noise else (LOSS, widest)


def rounding(results: dict[str, dict[str, Any]], configuration: Configuration) -> tuple[float, float] | None:
    """Return by how much plain verl's numbers in bf16 differ from those in fp32, of the configurations like this one.

    None if that was not run.
    """

    def kind(one: Configuration) -> tuple[str, bool]:
        return one.family, one.experts

    plain = [
        (CONFIGURATIONS[name].fp32, one)
        for name, one in results.get("plain", {}).items()
        if kind(CONFIGURATIONS[name]) == kind(configuration) and "error" not in one
    ]
    exact = [one for fp32, one in plain if fp32]
    found = [differences(one, exact[0]) for fp32, one in plain if exact and not fp32]
    return (max(loss for loss, _ in found), max(norm for _, norm in found)) if found else None


def differences(one: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Return the largest difference of the losses, relative to the largest of ``base``, and of the grad_norms.

    It is NaN if any of them is.
    """
    scale = max(map(abs, base["loss"]))
    losses = [abs(a - b) / scale for a, b in zip(one["loss"], base["loss"], strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(one["grad_norm"], base["grad_norm"], strict=True)]
    # max() keeps a NaN only if it comes first, and a sum any.
    return max(losses) + 0 * sum(losses), max(norms) + 0 * sum(norms)


def disagreements(results: dict[str, dict[str, Any]], tiny: bool) -> list[str]:
    """Return what is wrong, a line each: a configuration that did not run, or numbers that are not plain verl's."""
    lines = [
        f"{name}, {mode}: {one['error']}"
        for mode, of_mode in results.items()
        for name, one in of_mode.items()
        if "error" in one
    ]
    for name, one in results.get("overlay", {}).items():
        base = results.get("plain", {}).get(name, {"error": ""})
        if "error" in one or "error" in base or CONFIGURATIONS[name].scaling:
            continue
        for what, found, allowed in zip(
            ("loss", "grad_norm"), differences(one, base), bounds(results, name, tiny), strict=True
        ):
            if not found <= allowed:
                lines.append(
                    f"{name}: {what} differs from plain verl's by {found:.1e}, at most {allowed:.1e} is expected"
                )
    return lines


def ms(one: dict[str, Any]) -> float:
    """Return the median time of the counted steps."""
    return statistics.median(one["steps ms"][UNCOUNTED:] or one["steps ms"])


def rate(one: dict[str, Any]) -> float:
    """Return the tokens a second."""
    return statistics.median(one["tokens"]) / ms(one) * 1000


def cells(ours: dict[str, Any], plain: dict[str, Any], digits: int, figure: Any) -> str:
    """Return a figure of plain verl and of the overlay, or why there is none."""
    return " / ".join(
        one["error"] if "error" in one else f"{value:,.{digits}f}" if (value := figure(one)) is not None else "-"
        for one in (plain, ours)
    )


NOT_RUN = {"error": "not run"}


def peak(one: dict[str, Any]) -> float | None:
    """Return the memory of the rank that needs most, GB."""
    return max(one["peak GB"]) if one["peak GB"][0] is not None else None


def numbers_table(results: dict[str, dict[str, Any]], tiny: bool) -> str:
    """Return the configurations that are compared as a table in Markdown."""
    lines = [
        "| configuration | loss differs by (allowed) | grad_norm by (allowed) | step ms, plain / overlay | ratio "
        "| peak GB, plain / overlay |",
        "|---|---|---|---|---|---|",
    ]
    for name in names_in(results, scaling=False):
        plain, ours = (results.get(mode, {}).get(name, NOT_RUN) for mode in MODES)
        both = "error" not in plain and "error" not in ours
        compared = ["-", "-"]
        if both:
            pairs = zip(differences(ours, plain), bounds(results, name, tiny), strict=True)
            compared = [f"{found:.1e} ({allowed:.1e})" for found, allowed in pairs]
        ratio = f"{ms(plain) / ms(ours):.2f}x" if both else "-"
        row = [name, *compared, cells(ours, plain, 0, ms), ratio, cells(ours, plain, 2, peak)]
        lines.append(f"| {' | '.join(row)} |")
    for name, configuration in CONFIGURATIONS.items():
        if configuration.fp32 and (noise := rounding(results, configuration)):
            lines.append(f"| plain verl in bf16 against {name} | {noise[0]:.1e} | {noise[1]:.1e} | | | |")
    return "\n".join(lines)


def scaling_table(results: dict[str, dict[str, Any]]) -> str:
    """Return what two GPUs do against one as a table in Markdown."""
    lines = ["| | ms | tokens a second | of one GPU | peak GB of each rank |", "|---|---|---|---|---|"]
    for mode in MODES:
        for name in names_in(results, scaling=True):
            one, base = (results.get(mode, {}).get(which, NOT_RUN) for which in (name, "one GPU"))
            if "error" in one:
                lines.append(f"| {name}, {mode} | {one['error']} | | | |")
                continue
            times = f"{rate(one) / rate(base):.2f}x" if "error" not in base and one is not base else "-"
            memory = " / ".join(f"{gb:.1f}" if gb is not None else "-" for gb in one["peak GB"])
            lines.append(f"| {name}, {mode} | {ms(one):,.0f} | {rate(one):,.0f} | {times} | {memory} |")
    return "\n".join(lines)


def names_in(results: dict[str, dict[str, Any]], scaling: bool) -> list[str]:
    found = {name for of_mode in results.values() for name in of_mode}
    return [name for name, one in CONFIGURATIONS.items() if name in found and one.scaling == scaling and not one.fp32]


def report(results: dict[str, dict[str, Any]]) -> str:
    """Return on what was measured, and both tables."""
    done = [one for of_mode in results.values() for one in of_mode.values() if "error" not in one]
    devices = sorted({one["device"] for one in done})
    versions = sorted({f"{name} {version}" for one in done for name, version in one["versions"].items()})
    parts = [f"on {', '.join(devices)}; with {', '.join(versions)}"]
    if names_in(results, scaling=False):
        parts.append(numbers_table(results, on_cpu(results)))
    if names_in(results, scaling=True):
        parts.append(scaling_table(results))
    return "\n\n".join(parts)


def on_cpu(results: dict[str, dict[str, Any]]) -> bool:
    """Return whether tiny models ran on a CPU, in fp32."""
    return any(one.get("device") == "cpu" for of_mode in results.values() for one in of_mode.values())


def write_models(folder: Path, configurations: list[Configuration]) -> None:
    """Write the models in a process of its own, so that this one holds none of the GPU's memory."""
    for place, configuration in {model_folder(folder, one): one for one in configurations}.items():
        if place.exists():
            continue
        function = write_experts if configuration.experts else realistic.write_model
        writer = multiprocessing.get_context("spawn").Process(target=function, args=(place, configuration.size))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"the model could not be written to {place}")


def write_experts(folder: Path, size: Size) -> None:
    """Write a Qwen3-MoE of this size, with a quarter of its MLP in each of eight experts, of which two are chosen."""
    import torch
    from arithmetic import tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.intermediate // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocabulary,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configurations", help=f"of: {', '.join(CONFIGURATIONS)}; with a ; between them where a name has a comma"
    )
    parser.add_argument("--only", choices=["numbers", "scaling"])
    parser.add_argument("--modes", default=",".join(MODES), help="plain verl, and with the overlay")
    parser.add_argument("--steps", type=int, default=20, help="of each of the numbers; scaling takes half of them")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after them, and end what runs")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU; the default without two GPUs")
    parser.add_argument("--json", type=Path, help="write the results there, after each torchrun")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="run nothing, print what --json wrote")
    parser.add_argument("--folder", type=Path, help="keep the models there, and take those that are there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = list(CONFIGURATIONS)
    if options.configurations:
        names = options.configurations.split(";" if ";" in options.configurations else ",")
        names = [name for name in names if name]
    if options.child:
        be_a_rank(options, names)
        return
    results: dict[str, dict[str, Any]] = {}
    if options.merge:
        for file in options.merge:
            for mode, found in json.loads(file.read_text()).items():
                known = results.setdefault(mode, {})
                known.update({name: one for name, one in found.items() if name not in known or "error" not in one})
        done = [one for of_mode in results.values() for one in of_mode.values() if "error" not in one]
        refuse_several(sorted({one["device"] for one in done}), parser)
        print(report(results))
        return
    if unknown := sorted(set(names) - set(CONFIGURATIONS)):
        parser.error(f"no such configurations: {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")

    modes = options.modes.split(",")
    if unknown := sorted(set(modes) - set(MODES)):
        parser.error(f"no such modes: {', '.join(unknown)}; there are {', '.join(MODES)}")

    import torch

    tiny = options.tiny or torch.cuda.device_count() < 2
    if tiny:  # all of it is in fp32
        names = [name for name in names if not CONFIGURATIONS[name].fp32]
    if options.only:
        names = [name for name in names if CONFIGURATIONS[name].scaling == (options.only == "scaling")]

    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_models(folder, [CONFIGURATIONS[name].small() if tiny else CONFIGURATIONS[name] for name in names])
        families = dict.fromkeys(CONFIGURATIONS[name].family for name in names)
        for family in families:
            chosen = [name for name in names if CONFIGURATIONS[name].family == family]
            steps = options.steps // 2 if CONFIGURATIONS[chosen[0]].scaling else options.steps
            for mode in modes:
                begun = time.monotonic()
                now = [name for name in chosen if mode == "plain" or not CONFIGURATIONS[name].fp32]
                found = together(now, mode, folder, steps, tiny, until)
                results.setdefault(mode, {}).update(found)
                told = ", ".join(name + (f" ({one['error']})" if "error" in one else "") for name, one in found.items())
                held = max((one.get("held GB", 0.0) for one in found.values()), default=0.0)
                told += f"; {held:.2f} GB were held before one" if held > 0.05 else ""
                print(f"{mode} {family}: {told}; {time.monotonic() - begun:.0f} s", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))
    print(f"\n{report(results)}")
    if wrong := disagreements(results, tiny):
        raise SystemExit("\n".join(wrong))


def be_a_rank(options: argparse.Namespace, names: list[str]) -> None:
    """Train as one rank."""
    body = partial(run, names, options.folder, options.results, options.child, options.steps, options.tiny)
    try:
        if options.tiny and CONFIGURATIONS[names[0]].strategy == "megatron":
            import on_cpu

            on_cpu.answer_for_cuda()
            with on_cpu.CpuForCuda():
                body()
        else:
            body()
    except BaseException as error:
        traceback.print_exc()
        die(options.results, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
