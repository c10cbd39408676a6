"""``estimate``: what a step of GRPO takes by phase, with the overlay and without, before anything is run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

from verl_fl_overlay.cli import cost, model_folder, terminal
from verl_fl_overlay.cli.cost import CHIPS, PHASES, Chip, CostError, Shape
from verl_fl_overlay.errors import NOT_JSON

STACKS = {
    "padded": "verl as it is without flash-attn: padded sequences, sdpa",
    "flash-attn": "verl as it is with flash-attn: packed sequences",
    "overlay": "verl with the overlay: packed sequences, with flash-attn or without",
}

SPREAD = 0.8
"""The standard deviation of the logarithms of the responses' lengths, where only their mean is given."""

QUARTER = 0.25
"""Beyond this share of waiting an estimate is the host's, which differs between machines more than chips do."""

MOST, LARGEST = 100_000, 1_000_000_000
"""The most sequences of a step, and the largest number that is taken of anything else."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight, by the configuration's name of their type."""

WEIGHTS = 1_000_000
"""Smaller files, in bytes, are git's pointers to weights."""

COUNTS = {
    "prompt": (512, "tokens of each prompt"),
    "mean-response": (512, "tokens of a response on average, before the longest are cut"),
    "max-response": (2048, "tokens of the longest response"),
    "batch": (128, "prompts of a step"),
    "answers": (8, "responses to each prompt"),
    "micro-tokens": (16384, "tokens of a micro-batch, verl's ppo_max_token_len_per_gpu"),
    "updates": (1, "mini-batches of a step, each of which updates the weights"),
    "epochs": (1, "times that a step trains on its sequences, verl's ppo_epochs"),
    "chips": (1, "chips that train, data parallel"),
}
PEAKS = {
    "chip-tflops": ("flops", 1e12, "the chip's bf16 peak in TFLOP/s, without sparsity"),
    "chip-tbs": ("memory", 1e12, "the peak of its memory in TB/s"),
    "link-gbs": ("link", 1e9, "the peak of the link between chips in GB/s, in one direction"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "It counts the work from the model's sizes and the sequences' lengths, and knows what a unit of it took where "
        "it was measured. It says what is beyond that. docs/cost.md has the formula and its errors."
    )
    examples = (
        "verl-fl estimate MODEL --mean-response 900 --max-response 4096 --chips 2",
        "verl-fl estimate MODEL --lengths lengths.txt --chips 8 --chip H200",
        "verl-fl estimate MODEL --chip NEW --chip-tflops 400 --chip-tbs 1.6 --json",
    )
    terminal.explain(parser, more, examples=examples, exits={0: "estimated"})
    parser.add_argument(
        "model", metavar="MODEL", help="a model's folder; its config.json is read, and how large its weights are"
    )
    lengths = "whole numbers, the tokens of each sequence of a step (default: lengths as the next options say)"
    parser.add_argument("--lengths", metavar="FILE", help=lengths)
    for name, (number, what) in COUNTS.items():
        what += " (default: %(default)s)"
        parser.add_argument(f"--{name}", dest=name, type=int, default=number, metavar="N", help=what)
    chip = f"{', '.join(CHIPS)}, or any other whose peaks you give (default: %(default)s)"
    parser.add_argument("--chip", default="H100", metavar="NAME", help=chip)
    for name, (_, _, what) in PEAKS.items():
        what += " (default: that of --chip)"
        parser.add_argument(f"--{name}", dest=name, type=float, metavar="X", help=what)
    gen = "what generation and the sync of weights take, which stays as it is (default: %(default)s)"
    parser.add_argument("--gen-seconds", type=float, default=0.0, metavar="S", help=gen)
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the estimate.

    Raises:
        CostError, ModelError: nothing is known of the model, the chip or the batch.
    """
    model = model_folder.described(options.model)
    if model.layers_without_attention:
        raise CostError(f"some layers of {model.folder} have no attention; no such model was measured")
    shape = cost.shape(model.config)
    _refuse_other_weights(model, shape)
    known = json.loads(cost.FILE.read_text(encoding="utf-8"))
    found = estimate(shape, options, known)
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


def _refuse_other_weights(model: model_folder.Model, shape: Shape) -> None:
    """Refuse a model whose weights, if they are here, are not as many as those of a dense decoder of its sizes."""
    size = sum(file.stat().st_size for file in model.folder.glob("model*.safetensors"))
    width = WIDTHS.get(str(model.config.get("dtype") or model.config.get("torch_dtype")))
    if width is None or size < WEIGHTS:
        return
    counts = [shape.parameters, shape.parameters + shape.matrices[1]]  # a tied head may be stored all the same
    if not any(0.9 < size / width / count < 1.1 for count in counts):
        raise CostError(
            f"{model.folder} has {size / width / 1e9:.2f} billion weights, a dense decoder of its sizes with "
            f"gated MLPs {shape.parameters / 1e9:.2f}: it has other parts, and none such was measured, or files of its "
            "weights are missing; a folder with its config.json alone is taken as it is"
        )


def estimate(shape: Shape, options: argparse.Namespace, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return seconds by phase of each stack, what the overlay saves against the others, and each one's peak memory.

    ``known`` has the unit costs, and the range of what was measured.
    """
    given = vars(options)
    for name in COUNTS:
        if not 1 <= given[name] <= LARGEST:
            raise CostError(f"--{name} {given[name]}: allowed is 1 to {LARGEST:,}")
    if not 0 <= options.gen_seconds <= LARGEST:
        raise CostError(f"--gen-seconds {options.gen_seconds}: allowed is 0 to {LARGEST:,}")
    chip, lengths, chips = _chip(given), _lengths(given), given["chips"]
    if len(lengths) < chips * given["updates"]:
        raise CostError(f"{len(lengths)} sequences are too few for {chips} chips x {given['updates']} updates")
    taken: dict[str, dict[str, float]] = {stack: {"gen": options.gen_seconds} for stack in STACKS}
    peaks, waits = dict.fromkeys(STACKS, 0.0), 0.0
    spread = {
        updates: cost.micro_batches(lengths, chips=chips, updates=updates, tokens=given["micro-tokens"])
        for updates in {1, given["updates"]}
    }
    for phase, (train, entropy) in PHASES.items():
        updates, epochs = (given["updates"], given["epochs"]) if train else (1, 1)
        micro = spread[updates]
        for stack in STACKS:
            work = cost.work(shape, micro, stack, train=train, entropy=entropy, chips=chips, updates=updates)
            work = {name: amount * epochs for name, amount in work.items()} | {"dispatch": len(lengths)}
            taken[stack][phase] = cost.seconds(work, known["costs"], chip)
            peak = cost.peak_bytes(shape, micro, stack, train=train, entropy=entropy, chips=chips)
            peaks[stack] = max(peaks[stack], peak / 1e9)
            waits += cost.waiting(work, known["costs"], chip) if stack == "overlay" else 0
    steps = {stack: sum(phases.values()) for stack, phases in taken.items()}
    saved = {stack: step - steps["overlay"] for stack, step in steps.items() if stack != "overlay"}
    return {
        "parameters": shape.parameters,
        "sequences": {"number": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "chips": {"number": chips, "name": options.chip},
        "seconds": {stack: {**phases, "step": steps[stack]} for stack, phases in taken.items()},
        "seconds saved a step": saved,
        "chip-hours saved in 1,000 steps": {stack: seconds * chips / 3.6 for stack, seconds in saved.items()},
        "peak GB of a chip": peaks,
        "does not fit": [stack for stack, peak in peaks.items() if peak > chip.gigabytes],
        "extrapolated": list(
            _beyond(shape, chip, chips, known["measured"], waits / (steps["overlay"] - options.gen_seconds))
        ),
    }


def responses(mean: int, longest: int, count: int) -> list[int]:
    """Return ``count`` lengths in tokens, log-normal with this mean before those beyond the longest are cut."""
    normal = NormalDist(math.log(mean) - SPREAD**2 / 2, SPREAD)
    drawn = (round(math.exp(normal.inv_cdf((number + 0.5) / count))) for number in range(count))
    return [min(max(response, 1), longest) for response in drawn]


def _lengths(given: Mapping[str, Any]) -> list[int]:
    """Return the tokens of each sequence: the file's, or those of prompt and response."""
    if given["lengths"] is None:
        if (count := given["batch"] * given["answers"]) > MOST:
            raise CostError(f"--batch {given['batch']} x --answers {given['answers']}: allowed is up to {MOST:,}")
        return [given["prompt"] + n for n in responses(given["mean-response"], given["max-response"], count)]
    file = Path(given["lengths"]).expanduser()
    if not file.is_file():
        raise CostError(f"--lengths {given['lengths']} is no file; needed is one of whole numbers")
    try:
        found = [int(word) for word in file.read_text(encoding="utf-8").replace(",", " ").strip(" \n[]").split()]
    except NOT_JSON as error:
        raise CostError(f"--lengths {file}: {error}; needed are whole numbers, one a line or a list") from error
    if not 0 < len(found) <= MOST or min(found) < 1 or max(found) > LARGEST:
        needed = f"needed are 1 to {MOST:,}, each 1 to {LARGEST:,}"
        raise CostError(f"--lengths {file} has {len(found)} numbers; {needed}")
    return found


def _chip(given: Mapping[str, Any]) -> Chip:
    known = CHIPS.get(given["chip"].upper())
    peaks = {}
    for option, (peak, unit, _) in PEAKS.items():
        if given[option] is not None and not 0 < given[option] < math.inf:
            raise CostError(f"--{option} {given[option]}: allowed is more than 0")
        value = getattr(known, peak, None) if given[option] is None else given[option] * unit
        if value is None and peak == "link" and given["chips"] == 1:
            value = math.inf  # nothing goes over it
        if value is None:
            raise CostError(f"--chip {given['chip']}: known are {', '.join(CHIPS)}; of another one give --{option} too")
        peaks[peak] = value
    return Chip(**peaks, gigabytes=known.gigabytes if known else math.inf)


def _beyond(shape: Shape, chip: Chip, chips: int, measured: Mapping[str, Any], waiting: float) -> Iterator[str]:
    """Yield what makes the estimate one of what was not measured."""
    least, most = measured["parameters"]
    if not 0.9 * least <= shape.parameters <= 1.1 * most:
        yield f"measured were models of {least / 1e9:.1f} to {most / 1e9:.1f} billion parameters"
    if chip not in [CHIPS[name] for name in measured["chips"]]:
        yield f"measured was on {' and '.join(measured['chips'])}; what the host takes is as there"
    if chips > measured["most chips"]:
        yield f"the most chips that were measured: {measured['most chips']}; --link-gbs if they are not in one host"
    if waiting > QUARTER:
        yield f"{waiting:.0%} of the overlay's time is waiting for the host, and some hosts are twice as fast as others"


def as_text(found: dict[str, Any]) -> str:
    """Lay the estimate out as a table, with what it is of above, and what it is worth below."""
    seconds, sequences, chips = found["seconds"], found["sequences"], found["chips"]
    rows = [[phase, *(f"{seconds[stack][phase]:.2f}" for stack in STACKS)] for phase in seconds["overlay"]]
    for name, form in (("seconds saved a step", ".2f"), ("chip-hours saved in 1,000 steps", ".1f")):
        rows.append([name, *(format(found[name][stack], form) for stack in found[name]), "-"])
    rows.append(["peak GB of a chip", *(f"{peak:.1f}" for peak in found["peak GB of a chip"].values())])
    about = (
        f"a dense decoder with gated MLPs, {found['parameters'] / 1e9:.2f} billion parameters, on {chips['number']} "
        f"{chips['name']}; a step has {sequences['number']:,} sequences of {sequences['tokens']:,} tokens, the longest "
        f"{sequences['longest']:,}"
    )
    told = [f"{stack}: {what}" for stack, what in STACKS.items()]
    told += [f"{stack} needs more memory than the chip has; fewer --micro-tokens" for stack in found["does not fit"]]
    told += [f"extrapolated: {why}" for why in found["extrapolated"]]
    table = terminal.table(("seconds", *STACKS), rows)
    return "\n".join([*terminal.sentences([about]), "", *table, "", *terminal.sentences(told)])
