"""Fit what ``verl-fl estimate`` knows, and write the tables of docs/cost.md: ``python tools/cost.py [--check]``.

The measurements are in docs/measurements, in the forms that the benchmarks realistic, grpo and ranks write, and begin
with their names.  Those of ``benchmarks/alternating.py`` are read from docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

from tables import DOCS, ROOT, markdown, replaced

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from verl_fl_overlay import cli
from verl_fl_overlay.cli import cost
from verl_fl_overlay.cli.cost import CHIPS, PHASES, Shape
from verl_fl_overlay.cli.estimate import as_text, estimate, responses


def of_benchmark(file: str) -> dict[str, Any]:
    """Return what a benchmark defines, without the folders that it adds to the path."""
    path = sys.path[:]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return run_path(str(ROOT / "benchmarks" / file))
    finally:
        sys.path[:] = path


REAL, MODELS = of_benchmark("realistic.py")["REAL"], of_benchmark("step.py")["MODELS"]
SIZES, GRPO = of_benchmark("taught_model.py")["SIZES"], of_benchmark("grpo.py")
"""Batches, models, and the rows of the benchmark of GRPO."""

SCALING = {
    name: (one.ranks, 1 + one.twice) for name, one in of_benchmark("ranks.py")["CONFIGURATIONS"].items() if one.scaling
}
"""Configuration of benchmarks/ranks.py -> GPUs, and how many times the batch."""

MEASUREMENTS = DOCS / "measurements"
PAGE = DOCS / "cost.md"

ROWS = {
    "padded": ("padded", True),
    "padded overlay": ("padded overlay", True),
    "packed flash-attn": ("flash-attn", True),
    "packed overlay": ("overlay", True),
    "packed overlay recompute none": ("overlay", False),
}
"""Row of benchmarks/realistic.py -> the stack that it is, and whether its layers recompute."""

MEASURES = {"train": (True, False), "train with entropy": (True, True), "ref": (False, False), "old": (False, True)}
"""Its measure -> whether it trains, and whether entropy is asked for."""

ALTERNATING = {"verl as it is": "padded", "overlay, defaults": "padded overlay"}
"""Row of benchmarks/alternating.py -> the stack that it is."""

ASSUMED = {"memory": 1 / (0.9 * CHIPS["H100"].memory), "link": 1 / (0.7 * CHIPS["H100"].link), "dispatch": 0.0}
"""Unit costs that no measurement tells apart: the shares of memory's and the link's peaks that are reached."""

FITS = {
    "products": ("overlay", "train, busy"),
    "host overlay train": ("overlay", "train"),
    "host overlay infer": ("overlay", "ref"),
    "native modules": ("flash-attn", "train, busy"),
    "host native train": ("flash-attn", "train"),
    "host native infer": ("flash-attn", "ref"),
    "entropy train": ("flash-attn", "train with entropy"),
    "entropy infer": ("flash-attn", "old"),
    "masked attention": ("padded overlay", "ref"),
    "loop train": ("padded", "train"),
    "loop infer": ("padded", "ref"),
    "dispatch": ("overlay", "ref"),
}
"""Unit cost -> stack and measure from which it is fitted: what those before it leave of the first such figure."""


@dataclass(frozen=True)
class Figure:
    """Something measured: where, the seconds, and the work that took them."""

    source: str
    row: str
    what: str
    stack: str
    chip: str
    chips: int
    parameters: int
    seconds: float
    work: dict[str, float]
    peak: tuple[float, float] | None = None
    """The most memory, bytes: measured and estimated."""
    setting: str = ""
    """What the rows of a file have in common that are compared with each other; "" where none are."""


def shape_of(size: Any, *, tied: bool) -> Shape:
    """Return the shape of a model that a benchmark writes."""
    head = size.hidden // size.heads
    return Shape(size.layers, size.hidden, size.intermediate, size.heads, size.kv_heads, head, size.vocabulary, tied)


def read(benchmark: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the name of each file of a benchmark, and what it has under each name."""
    for file in sorted(MEASUREMENTS.glob(f"{benchmark}-*.json")):
        for name, found in json.loads(file.read_text(encoding="utf-8")).items():
            yield file.stem, name, found


def chip_of(run: dict[str, Any]) -> str:
    """Return which of the chips a run was on."""
    return next(name for name in CHIPS if name in run["device"])


def batch() -> tuple[Shape, list[list[int]]]:
    """Return the model and the micro-batches of ``benchmarks/realistic.py``."""
    lengths = [sum(both) for both in REAL.lengths()]
    return shape_of(REAL, tied=True), cost.micro_batches(lengths, tokens=REAL.tokens)


def realistic() -> Iterator[Figure]:
    """Yield what ``benchmarks/realistic.py`` measured; how long the GPU was busy is a figure of its own."""
    shape, micro = batch()
    for source, row, runs in read("realistic"):
        for measure, (train, entropy) in MEASURES.items():
            done = [run[measure] for run in runs if "ms" in run.get(measure, {})]
            if row not in ROWS or not done:
                continue
            stack, recompute = ROWS[row]
            work = cost.work(shape, micro, stack, train=train, entropy=entropy, recompute=recompute)
            about = (stack, chip_of(runs[0]), 1, shape.parameters)
            peaks = [one["peak GB"] * 1e9 for one in done if one.get("peak GB")] if recompute else []
            own = cost.peak_bytes(shape, micro, stack, train=train, entropy=entropy)
            peak = (statistics.median(peaks), own) if peaks else None
            time = statistics.median(one["ms"] for one in done) / 1000
            yield Figure(source, row, measure, *about, time, work, peak)
            if busy := [one["busy ms"] / 1000 for one in done if "busy ms" in one]:
                on_gpu = {name: amount for name, amount in work.items() if name in cost.SCALES}
                yield Figure(source, row, f"{measure}, busy", *about, statistics.median(busy), on_gpu)


def alternating() -> Iterator[Figure]:
    """Yield what ``benchmarks/alternating.py`` measured: padded batches, nothing recomputed."""
    for line in (DOCS / "performance.md").read_text(encoding="utf-8").splitlines():
        row, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        for name, column in {"A": 0, "B": 3}.items() if row in ALTERNATING else ():
            model, stack = MODELS[name], ALTERNATING[row]
            shape = shape_of(model, tied=False)
            micro = cost.micro_batches([model.length] * model.rows, rows=model.micro_batch)
            work = cost.work(shape, micro, stack, train=True, recompute=False)
            about = (stack, "H100", 1, shape.parameters)
            yield Figure("performance.md", f"model {name}, {row}", "train", *about, float(numbers[column]) / 1000, work)


def grpo() -> Iterator[Figure]:
    """Yield the phases that ``benchmarks/grpo.py`` measured; it has a step's tokens, spread as taught."""
    for source, row, result in read("grpo"):
        stack, named = result["row"], "model" in result and result["model"] != "tiny"
        if not named or stack not in cost.STACKS or result["variant"] or not result["took turns"]:
            continue
        steps = [step for step in result["steps"] if step["counted"]]
        size, limit, chips = SIZES[result["model"]], GRPO["ROWS"][stack].tokens, result["gpus"]
        prompt, count = size.prompt // 2, result["sequences"]
        shape, tokens = shape_of(size, tied=True), statistics.median(step["tokens"] for step in steps)
        lengths = [prompt + n for n in responses(round(tokens / count) - prompt, size.longest, count)]
        micro = cost.micro_batches(lengths, chips=chips, tokens=limit)
        for phase, (train, entropy) in PHASES.items():
            name = "old" if phase == "old_log_prob" else phase
            if times := [step[name] for step in steps if name in step]:
                work = cost.work(shape, micro, stack, train=train, entropy=entropy, chips=chips) | {"dispatch": count}
                about = (stack, chip_of(result), chips, shape.parameters)
                setting = f"GRPO, {result['model']}"
                yield Figure(source, row, phase, *about, statistics.median(times), work, setting=setting)


def ranks() -> Iterator[Figure]:
    """Yield the updates that ``benchmarks/ranks.py`` measured on one GPU and on two, for as long as it settles."""
    shape, own = shape_of(REAL, tied=True), [sum(both) for both in REAL.lengths()]
    for source, mode, results in read("ranks"):
        stack = "overlay" if mode == "overlay" else "flash-attn"
        for name, (chips, times) in SCALING.items():
            result, lengths = results.get(name, {}), own * times
            if "steps ms" not in result or result["device"] == "cpu":
                continue
            micro = cost.micro_batches(lengths, chips=chips, tokens=REAL.tokens)
            work = cost.work(shape, micro, stack, train=True, chips=chips)
            settled = result["steps ms"][len(result["steps ms"]) // 2 :]
            peak = (max(result["peak GB"]) * 1e9, cost.peak_bytes(shape, micro, stack, train=True, chips=chips))
            about = (stack, chip_of(result), chips, shape.parameters)
            time = statistics.median(settled) / 1000
            yield Figure(source, f"{name}, {mode}", "update_actor", *about, time, work, peak, name)


def figures() -> list[Figure]:
    """Return all that was measured."""
    return [*realistic(), *alternating(), *grpo(), *ranks()]


def basis(found: Iterable[Figure]) -> dict[str, Figure]:
    """Return unit cost -> the figure from which it is fitted; none where that was not measured yet."""
    by_name: dict[str, Figure] = {}
    for figure in found:
        for name, fit in FITS.items():
            if name in figure.work and fit == (figure.stack, figure.what):
                by_name.setdefault(name, figure)
    return {name: by_name[name] for name in FITS if name in by_name}


def fitted(found: Iterable[Figure]) -> dict[str, float]:
    """Return unit cost -> seconds a unit, on an H100, to four digits."""
    costs = dict(ASSUMED)
    for name, figure in basis(found).items():
        chip, known = CHIPS[figure.chip], {each: amount for each, amount in figure.work.items() if each != name}
        on_chip, host, after = cost.parts(known, {**dict.fromkeys(known, 0.0), **costs}, chip)
        left = figure.seconds - after
        if name.startswith(cost.AFTER):
            left -= max(on_chip, host)
        elif not name.startswith("host"):
            left -= on_chip
        if left <= 0:
            raise SystemExit(f"{figure.source}, {figure.row}, {figure.what}: nothing is left for {name}")
        costs[name] = float(f"{left / figure.work[name] / cost.scale(name, chip):.4g}")
    return costs


def held_out(found: list[Figure]) -> Iterator[tuple[Figure, float, float]]:
    """Yield each time to which nothing was fitted, what the model says of it, and how much of that is waiting."""
    costs, used = fitted(found), basis(found).values()
    for figure in found:
        if figure not in used and "busy" not in figure.what:
            chip = CHIPS[figure.chip]
            yield figure, cost.seconds(figure.work, costs, chip), cost.waiting(figure.work, costs, chip)


def data(found: list[Figure]) -> str:
    """Return what cost.json has."""
    sizes = [figure.parameters for figure in found]
    measured = {
        "parameters": [min(sizes), max(sizes)],
        "chips": sorted({figure.chip for figure in found}),
        "most chips": max(figure.chips for figure in found),
    }
    return json.dumps({"costs": fitted(found), "measured": measured}, indent=1) + "\n"


def constants(found: list[Figure]) -> str:
    """Return the table of unit costs."""
    forms = {"flops": "{:,.0f} TFLOP/s", "memory": "{:.2f} TB/s", "link": "{:.3f} TB/s", None: "{:,.3f} ms"}
    sources, rows = basis(found), []
    for name, value in fitted(found).items():
        peak, figure = cost.SCALES.get(name), sources.get(name)
        where = f"`{figure.source}`: {figure.row}, {figure.what}" if figure else "assumed"
        rows.append([name, forms[peak].format(1e-12 / value if peak else 1000 * value), where])
    return markdown(["unit cost", "on an H100", "fitted from"], rows)


def checked(found: list[Figure]) -> str:
    """Return the table of what was measured and what the model says of it."""
    rows = [
        [
            f"{figure.source}: {figure.row}",
            str(figure.chips),
            figure.what,
            f"{figure.seconds:.3f}",
            f"{says:.3f}",
            f"{100 * (says / figure.seconds - 1):+.0f} %",
            f"{100 * waiting / says:.0f} %",
        ]
        for figure, says, waiting in held_out(found)
    ]
    return markdown(["row", "GPUs", "phase", "measured, s", "estimated, s", "error", "of it waiting"], rows)


def savings(found: list[Figure]) -> str:
    """Return the table of what the overlay saves in the phases that both rows have, measured and estimated."""
    costs = fitted(found)
    settings: dict[tuple[str, str, int], dict[str, dict[str, tuple[float, float]]]] = {}
    for figure in (figure for figure in found if figure.setting):
        stacks = settings.setdefault((figure.source, figure.setting, figure.chips), {})
        times = figure.seconds, cost.seconds(figure.work, costs, CHIPS[figure.chip])
        stacks.setdefault(figure.stack, {})[figure.what] = times
    rows = []
    for (source, setting, chips), stacks in settings.items():
        ours = stacks.pop("overlay", {})
        for stack, theirs in stacks.items():
            both = [phase for phase in theirs if phase in ours]
            saved = (sum(theirs[phase][which] - ours[phase][which] for phase in both) for which in (0, 1))
            if both and not stack.endswith("overlay"):
                about = [f"{source}: {setting}", str(chips), stack, ", ".join(both)]
                rows.append([*about, *(f"{seconds:.2f}" for seconds in saved)])
    if not rows:
        return "No run of GRPO or of several GPUs is among the measurements yet."
    return markdown(["run", "GPUs", "against", "phases", "saved, s", "estimated, s"], rows)


def memory(found: list[Figure]) -> str:
    """Return the table of the most memory, measured and estimated."""
    rows = [
        [
            f"{figure.source}: {figure.row}",
            str(figure.chips),
            figure.what,
            *(f"{each / 1e9:.1f}" for each in figure.peak),
        ]
        for figure in found
        if figure.peak
    ]
    shape, micro = batch()
    for source, row, runs in read("realistic"):
        for measure, (train, entropy) in MEASURES.items() if row in ROWS else ():
            if "memory" in runs[0].get(measure, {}).get("error", ""):
                own = cost.peak_bytes(shape, micro, ROWS[row][0], train=train, entropy=entropy)
                rows.append([f"{source}: {row}", "1", measure, "did not fit into 80", f"{own / 1e9:.1f}"])
    return markdown(["row", "GPUs", "phase", "measured, GB", "estimated, GB"], rows)


EXAMPLES = {
    "Qwen2.5-0.5B": (Shape(24, 896, 4864, 14, 2, 64, 151936, tied=True), "--mean-response 300"),
    "Qwen2.5-1.5B": (shape_of(REAL, tied=True), "--mean-response 900 --max-response 4096 --gen-seconds 60"),
    "Qwen2.5-7B": (
        Shape(28, 3584, 18944, 28, 4, 128, 152064, tied=False),
        "--mean-response 900 --max-response 4096 --chips 8 --updates 4 --gen-seconds 60",
    ),
}
"""Folder of a model -> its shape, and options."""


def examples(found: list[Figure]) -> str:
    """Return what the command prints for the examples, as by the measurements that are here now."""
    texts = []
    for name, (shape, flags) in EXAMPLES.items():
        options = cli.parser(["estimate"]).parse_args(["estimate", name, *flags.split()])
        printed = as_text(estimate(shape, options, json.loads(data(found))))
        texts.append(f"`verl-fl estimate {name} {flags}`:\n```text\n{printed}\n```")
    return "\n\n".join(texts)


PARTS = {"constants": constants, "checked": checked, "savings": savings, "memory": memory, "examples": examples}


def main() -> int:
    """Write what is outdated, or with --check only tell whether anything is; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    check, found = parser.parse_args().check, figures()
    page = PAGE.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        page = replaced(page, name, "tools/cost.py", make(found))
    made: dict[Path, str] = {cost.FILE: data(found), PAGE: page}
    outdated = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in outdated if not check else ():
        file.write_text(made[file], encoding="utf-8")
    return int(check and bool(outdated))


if __name__ == "__main__":
    raise SystemExit(main())
