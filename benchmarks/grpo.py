"""verl's own main_ppo with answers from vLLM, as verl is and with the overlay: what a step takes, phase by phase.

python benchmarks/grpo.py [--rows "padded,overlay"] [--variants lora] [--gpus N] [--json FILE] [--minutes M]
python benchmarks/grpo.py --merge FILE...     prints the tables of earlier runs, file by file

Each row is the recipe examples/recipes/grpo_vllm.sh: FSDP2, vLLM on the same GPUs, KL loss with a reference.  All rows
start at once, on model and data of taught_model.py, and then take turns of --steps steps, so that one alone uses the
GPU; the first step of a turn, whose answers waited, is not counted.  So one card holds all of them: their KV cache is
bounded, and vLLM sleeps while verl trains.  With --turns 0 nobody waits, and only the numbers mean something.

gen is verl's own figure, which comes in jumps of 2 s, in which its replay buffer polls; answers is the time from the
first answer of a step to the last.  Without a GPU a tiny model runs with the demonstration's rollout in place of vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("examples", "tools", "benchmarks")]

import realistic  # noqa: E402
import recipe  # noqa: E402
from locks import locked  # noqa: E402
from realistic import one_line  # noqa: E402
from taught_model import LESSONS, SIZES  # noqa: E402

MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"
PADDED = ("{part}.use_remove_padding=False", "+{part}.override_config.attn_implementation=sdpa")


@dataclass(frozen=True)
class Row:
    """A row of benchmarks/realistic.py, and tokens of a micro-batch: padded rows make several times as many of them."""

    engine: str
    tokens: int = 16384

    @property
    def kind(self) -> realistic.Row:
        """What is there and on."""
        return realistic.ROWS[self.engine]


ROWS = {
    "padded": Row("padded", tokens=4096),
    "flash-attn": Row("packed flash-attn"),
    "overlay": Row("packed overlay"),
    "flash-attn overlay": Row("packed flash-attn overlay"),
    "padded overlay": Row("padded overlay", tokens=4096),
}

VARIANTS = {
    "": (),
    "no-kl": ("actor_rollout_ref.actor.use_kl_loss=False",),
    "lora": (f"{MODEL}.lora_rank=16", f"{MODEL}.lora_alpha=32", "actor_rollout_ref.actor.optim.lr=2e-3"),
    "critic": (
        "algorithm.adv_estimator=gae",
        "critic.strategy=fsdp2",
        "critic.model.path={model}",
        "critic.ppo_max_token_len_per_gpu={tokens}",
    ),
    "fsdp1": ("actor_rollout_ref.actor.strategy=fsdp",),
    "chunked-head": (),
}
"""Name -> what it adds to the recipe; "" is the recipe."""

VARIABLES = {"chunked-head": {"VERL_FL_HEAD": "chunked"}}
"""Variant -> variables that it sets in rows with the overlay."""

METRICS = {
    "gen": "timing_s/gen",
    "old": "timing_s/old_log_prob",
    "ref": "timing_s/ref",
    "values": "timing_s/values",
    "update_critic": "timing_s/update_critic",
    "update_actor": "timing_s/update_actor",
    "update_weights": "timing_s/update_weights",
    "step": "timing_s/step",
    "reward": "critic/score/mean",
    "loss": "actor/pg_loss",
    "grad_norm": "actor/grad_norm",
    "entropy": "actor/entropy",
    "kl": "rollout_corr/kl",
    "probability difference": "training/rollout_probs_diff_mean",
    "correlation": "training/rollout_actor_probs_pearson_corr",
    "tokens": "perf/total_num_tokens",
    "longest answer": "response_length/max",
    "allocated GB": "actor/perf/max_memory_allocated_gb",
    "reserved GB": "actor/perf/max_memory_reserved_gb",
}
"""What is kept of verl's metrics of a step."""

PHASES = ("gen", "old", "ref", "values", "update_critic", "update_actor", "update_weights", "step")
PACKAGES = ("torch", "triton", "verl", "vllm", "ray", "transformers", "flash-attn", "verl-fl-overlay")

BATCH, ANSWERS = 16, 8
"""Questions in a step, and answers to each."""

KV_CACHE = 2_000_000_000
"""Bytes, in each copy of vLLM: that many rows fit on one card, and that none counts what another one frees."""

LIKE = {"difference": 1.1, "reward": 0.15}
"""The overlay's difference between rollout and actor is at most so many times that of a row without; rewards differ so.

Probabilities differ only where the model is not sure of the next token, so the difference is told per nat of entropy.
"""

GRACE = 20
"""Seconds that runs which are told to end have to take their Ray processes along."""


@dataclass(frozen=True)
class Run:
    """One main_ppo: a row, what it adds, and where it writes."""

    row: str
    variant: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row} {self.variant}".strip()

    @property
    def file_name(self) -> str:
        """Its name in names of files and in Ray's folder, whose sockets bear 107 characters at most."""
        return re.sub(r"\W+", "-", self.name)


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    data: Path
    size: str
    gpus: int
    steps: int
    turns: int
    eager: bool
    batch: int = BATCH

    @property
    def total(self) -> int:
        return self.steps * max(1, self.turns)

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"


def overrides(run: Run, plan: Plan) -> list[str]:
    """Return what is passed to verl's main_ppo."""
    row, size = ROWS[run.row], SIZES[plan.size]
    model = plan.data / "model"
    more = [line.format(model=model, tokens=row.tokens) for line in VARIANTS[run.variant]]
    if not row.kind.packed:
        parts = [MODEL, *(["critic.model"] if run.variant == "critic" else [])]
        more += [line.format(part=part) for part in parts for line in PADDED]
    if plan.tiny:
        return [*on_a_cpu(run, plan), *more]
    return [
        *recipe.overrides(
            MODEL=model,
            DATA=plan.data / "problems.parquet",
            REWARD=ROOT / "benchmarks" / "turns.py",
            OUT=run.folder,
            GPUS=plan.gpus,
            VLLM_MEMORY=0.15,
            PROMPT=size.prompt,
            RESPONSE=size.longest,
            BATCH=plan.batch,
            ANSWERS=ANSWERS,
            TOKENS=row.tokens,
            LR=size.later_rate,
            EPOCHS=1000,
            SAVE=-1,
        ),
        f"trainer.total_training_steps={plan.total}",
        f"{ROLLOUT}.enforce_eager={plan.eager}",
        f"+{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes={KV_CACHE}",
        f"{ROLLOUT}.agent.num_workers={plan.gpus}",
        "reward.num_workers=1",  # one process counts the answers
        "data.dataloader_num_workers=0",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "+ray_kwargs.ray_init.address=local",
        "+ray_kwargs.ray_init.include_dashboard=False",
        *more,
    ]


def on_a_cpu(run: Run, plan: Plan) -> list[str]:
    """Return the arguments of the demonstration on a CPU, with this benchmark's data and reward."""
    from grpo import trainer_arguments  # that of examples/

    size = SIZES[plan.size]
    replaced = {
        "data.train_files": plan.data / "problems.parquet",
        "data.val_files": plan.data / "problems.parquet",
        "data.train_batch_size": plan.batch,
        "data.max_prompt_length": size.prompt,
        "data.max_response_length": size.longest,
        "reward.custom_reward_function.path": ROOT / "benchmarks" / "turns.py",
        f"{MODEL}.path": plan.data / "model",
        "actor_rollout_ref.actor.ppo_mini_batch_size": plan.batch,
        "actor_rollout_ref.actor.optim.lr": size.later_rate,
        "trainer.n_gpus_per_node": 1,
    }
    given = dict(line.split("=", 1) for line in trainer_arguments(run.folder, plan.total))
    return [f"{key}={value}" for key, value in {**given, **replaced}.items()]


def environment(run: Run, plan: Plan, turns: Path, ray: str) -> dict[str, str]:
    """Return the variables that make a row; on a CPU verl needs the overlay in every row."""
    row = ROWS[run.row]
    made = {k: v for k, v in realistic.environment(row.engine, plan.tiny).items() if not k.startswith("RAY_")}
    made |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": ray,  # a cluster of its own for each
        "TURNS_FOLDER": str(turns),
        "TURNS_PROCESS": str(os.getpid()),
        "TURNS_RUN": run.file_name,
        "TURNS_ANSWERS": str(plan.batch * ANSWERS),
        "TURNS_STEPS": str(plan.steps if plan.turns else 0),
    }
    if row.kind.overlay:
        made |= {"VERL_FL_REPORT_DIR": str(run.folder / "reports"), **VARIABLES.get(run.variant, {})}
    if plan.tiny:
        paths = [str(ROOT / "examples"), made.get("PYTHONPATH", "")]
        made |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return made


class Started:
    """A run's process, from its start to its end."""

    def __init__(self, run: Run, plan: Plan, turns: Path, lock: IO[str]) -> None:
        self.run, self.plan, self.turns = run, plan, turns
        run.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*run.folder.glob("reports/*.json"), *turns.glob(f"{run.file_name}.*")):
            stale.unlink()
        self.log = run.folder / "train.log"
        self.ray = tempfile.mkdtemp(prefix="ray")
        self.begun = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(run, plan)],
                env=environment(run, plan, turns, self.ray),
                cwd=run.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def waits(self, turn: int) -> bool:
        """Whether its turn is over or it is ready for its first one; a run that ended waits for nothing."""
        return self.ended or (self.turns / f"{self.run.file_name}.waits-{turn}").exists()

    def go(self, turn: int) -> None:
        (self.turns / f"{self.run.file_name}.goes-{turn}").touch()

    def result(self) -> dict[str, Any]:
        """Return what it did until now: figures of the steps, or why there are none."""
        text = self.log.read_text(errors="replace")
        steps = [metrics(line) for line in text.splitlines() if re.search(r"step:\d+ - ", line)]
        about = {"row": self.run.row, "variant": self.run.variant, "device": device(), "versions": versions(self.run)}
        if not steps:
            said = [line for line in text.splitlines() if "Error" in line]
            why = one_line(said[-1]) if said else "no step in the time there was"
            return {"error": why, **about}
        answers = self.turns / f"{self.run.file_name}.answers"
        for line in answers.read_text().splitlines() if answers.exists() else ():
            number, seconds = line.split()
            for step in steps:
                if step["number"] == int(number):
                    step["answers"] = float(seconds)
        for step in steps:
            step["counted"] = step["number"] > 1 and (not self.plan.turns or (step["number"] - 1) % self.plan.steps > 0)
        return {
            "steps": steps,
            "asked steps": self.plan.total,
            "model": self.plan.size,
            "gpus": self.plan.gpus,
            "sequences": self.plan.batch * ANSWERS,
            "took turns": bool(self.plan.turns),
            "eager": self.plan.eager,
            **about,
            **reported(self.run.folder / "reports"),
        }


def end(started: list[Started]) -> None:
    """Have all end at once, and their Ray processes with them, and remove what Ray wrote."""
    for each in started:
        if not each.ended:
            each.process.terminate()
    until = time.monotonic() + GRACE
    for each in started:
        try:
            each.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
        shutil.rmtree(each.ray, ignore_errors=True)


def metrics(line: str) -> dict[str, float]:
    """Return what is kept of a line of verl's console logger."""
    found = dict(re.findall(r"(\S+?):(?:np\.\w+\()?([-+.\deE]+|nan)", line))
    kept = {name: float(found[metric]) for name, metric in METRICS.items() if metric in found}
    return {"number": int(found["step"]), **kept}


def reported(folder: Path) -> dict[str, Any]:
    """Return how many processes with verl reported, and their problems, of a row with the overlay."""
    if not folder.exists():
        return {}
    reports = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    problems = sorted({problem for report in reports for problem in report["problems"]})
    return {"reports": len(reports), "problems": problems}


@cache
def device() -> str:
    """Return the card's name without loading torch, which would take memory of it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "cpu"


def versions(run: Run) -> dict[str, str]:
    """Return the versions of what ran; in flash-attn's place may be torch's own kernel."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if ROWS[run.row].kind.flash_attn:
        found.setdefault("flash-attn", "torch's kernel in its place")
    else:
        found.pop("flash-attn", None)
    return found


def take_turns(started: list[Started], plan: Plan, until: float) -> None:
    """Let one run after the other go on for a turn, until all have ended or the time is over.

    One that ends is told at once: what fails at its start need not be found out after all turns of the others.
    """
    going = list(started)

    def waited(done: Callable[[], bool]) -> None:
        while True:
            for each in [run for run in going if run.ended]:
                going.remove(each)
                tell(each)
            if done() or time.monotonic() >= until:
                return
            time.sleep(0.2)

    if plan.turns:
        waited(lambda: all(each.waits(0) for each in started))
        for turn in range(plan.turns):
            for each in [run for run in started if run in going]:
                each.go(turn)
                waited(lambda each=each, turn=turn: each.waits(turn + 1))
                if each in going:
                    tell(each)
    waited(lambda: not going)


def tell(each: Started) -> None:
    """Print how far a run is."""
    result = each.result()
    done = result.get("steps", [])
    said = result.get("error") or f"step {done[-1]['number']} of {each.plan.total}, {done[-1]['step']:.1f} s"
    print(f"{time.time() - each.begun:5.0f} s  {each.run.name}: {said}", flush=True)


def counted(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps that are compared."""
    return [step for step in result["steps"] if step["counted"]]


def median(result: dict[str, Any], name: str) -> float | None:
    values = [step[name] for step in counted(result) if name in step]
    return statistics.median(values) if values else None


def difference(result: dict[str, Any]) -> float | None:
    """Return how far the probabilities of rollout and actor are apart, per nat of entropy; the mean of all steps."""
    steps = [step for step in result["steps"] if step.get("entropy") and "probability difference" in step]
    return statistics.mean(s["probability difference"] / s["entropy"] for s in steps) if steps else None


def ends(result: dict[str, Any], name: str) -> tuple[float, float]:
    """Return the mean of a metric over the first third of all steps and over the last one."""
    values = [step[name] for step in result["steps"]]
    third = max(1, len(values) // 3)
    return statistics.mean(values[:third]), statistics.mean(values[-third:])


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: dict[str, Any]) -> str:
    """Return the runs as tables in Markdown: seconds by phase, and then numbers and memory."""
    names = [*PHASES[:1], "answers", *PHASES[1:]]
    lines = [f"| run | {', s | '.join(names)}, s |", "|---" * (len(names) + 1) + "|"]
    numbers = [
        "| run | steps, counted | tokens a step | reward | rollout against actor: mean difference of probabilities, "
        "the same per nat of entropy, correlation, kl | peak allocated / reserved GB | reports, problems |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, result in results.items():
        if "error" in result:
            lines.append(f"| {run} | {result['error']} |" + " |" * (len(names) - 1))
            continue
        lines.append(f"| {run} | {' | '.join(shown(median(result, name)) for name in names)} |")
        before, after = ends(result, "reward")
        apart = (shown(median(result, "probability difference"), 5), shown(difference(result), 5))
        cells = [
            f"{len(result['steps'])}, {len(counted(result))}",
            shown(median(result, "tokens"), 0),
            f"{before:.3f} -> {after:.3f}",
            ", ".join((*apart, shown(median(result, "correlation"), 4), shown(median(result, "kl"), 5))),
            f"{shown(median(result, 'allocated GB'), 1)} / {shown(median(result, 'reserved GB'), 1)}",
            f"{result['reports']}, {len(result['problems'])}" if "reports" in result else "-",
        ]
        numbers.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *numbers])


def compared(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return which run with the overlay is compared with which without it: of the same variant, in the same file."""
    runs = {run: result for run, result in results.items() if "error" not in result}
    return [
        (run, base)
        for run in runs
        for base in runs
        if "overlay" in runs[run]["row"]
        and "overlay" not in runs[base]["row"]
        and runs[run]["variant"] == runs[base]["variant"]
    ]


def ratios(results: dict[str, Any]) -> str:
    """Return how many times as long a run without the overlay takes, as a table in Markdown."""
    names = [*PHASES[:1], "answers", *PHASES[1:]]
    lines = [f"| run | against | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for run, base in compared(results):
        cells = []
        for name in names:
            ours, theirs = median(results[run], name), median(results[base], name)
            cells.append(f"{theirs / ours:.2f}x" if ours and theirs else "-")
        lines.append(f"| {run} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def disagreements(results: dict[str, Any]) -> list[str]:
    """Return in words where a run is not complete, or not like the one without the overlay."""
    said = [f"{run}: {result['error']}" for run, result in results.items() if "error" in result]
    for run, result in results.items():
        if "error" not in result:
            if len(result["steps"]) < result["asked steps"]:
                said.append(f"{run}: {len(result['steps'])} steps of {result['asked steps']}")
            said += [f"{run}: {problem}" for problem in result.get("problems", ())]
    for run, base in compared(results):
        ours, theirs = (difference(results[each]) for each in (run, base))
        if ours is not None and theirs is not None and not ours <= LIKE["difference"] * theirs:
            said.append(f"{run}: rollout and actor differ by {ours:.2e} per nat of entropy, in {base} by {theirs:.2e}")
        rewards = [ends(results[each], "reward")[1] for each in (run, base)]
        if not abs(rewards[0] - rewards[1]) <= LIKE["reward"]:
            said.append(f"{run}: the reward ends at {rewards[0]:.3f}, in {base} at {rewards[1]:.3f}")
    return said


def about(results: dict[str, Any]) -> str:
    """Return on what it was measured."""
    cards = sorted({f"{result['device']} x{result.get('gpus', '?')}" for result in results.values()})
    packages = sorted({f"{name} {found}" for result in results.values() for name, found in result["versions"].items()})
    models = sorted({result["model"] for result in results.values() if "model" in result})
    return f"on {', '.join(cards)}; model {', '.join(models)}; with {', '.join(packages)}"


def report(results: dict[str, Any]) -> str:
    """Return on what it was measured, and the tables."""
    return f"{about(results)}\n\n{table(results)}\n\n{ratios(results)}"


def prepare(plan: Plan, lessons: int) -> None:
    """Write model and questions, if they are not there, in a process that then frees the GPU."""
    if not (plan.data / "model" / "taught.json").exists():
        print(f"teaching the model in {plan.data}", flush=True)
        command = [sys.executable, ROOT / "benchmarks" / "taught_model.py", plan.data, plan.size]
        # Lessons of many lengths would leave the GPU's memory in pieces.
        more = {"OMP_NUM_THREADS": "1"} if plan.tiny else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        command += ["cpu" if plan.tiny else "cuda", str(lessons)]
        subprocess.run(command, env={**os.environ, **more}, check=True)


def chosen(given: str | None, known: Iterable[str], what: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a list that is separated by commas, each once, or stop if one is unknown."""
    names = list(dict.fromkeys(given.split(","))) if given is not None else []
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such {what}: {', '.join(unknown)}; there are {', '.join(filter(None, known))}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="of: " + "; ".join(f"{name}: {row.kind.what}" for name, row in ROWS.items()))
    parser.add_argument("--variants", help=f"of: {', '.join(filter(None, VARIANTS))}; default: the recipe as it is")
    parser.add_argument("--gpus", type=int, default=1, help="of this host, for each row")
    parser.add_argument("--size", choices=SIZES, help="of the model; default: 0.5B, and tiny without a GPU")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--turns", type=int, default=3, help="of each row; 0: all at once, for the numbers alone")
    parser.add_argument("--batch", type=int, default=BATCH, help="questions in a step")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: a faster start")
    parser.add_argument("--minutes", type=float, default=60, help="all runs end then, and what they did is kept")
    parser.add_argument("--folder", type=Path, default=Path("out/bench-grpo"), help="for model, logs and reports")
    parser.add_argument("--lessons", type=int, default=LESSONS, help="updates that teach the model, at most")
    parser.add_argument("--prepare", action="store_true", help="only write model and questions")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="run nothing, print what --json wrote")
    options = parser.parse_args()
    if options.merge:
        for file in options.merge:
            print(f"{file.name}: {report(json.loads(file.read_text()))}\n")
        return 0
    for name in ("gpus", "batch", "lessons", "minutes"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} {getattr(options, name)}: allowed is more than 0")
    if options.turns < 0 or options.steps < 2:
        parser.error(f"--turns {options.turns} of --steps {options.steps}: the first step of each is not counted")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.open("a").close()  # what cannot be written is told before anything has run
    on_gpu = device() != "cpu"
    size = options.size or ("0.5B" if on_gpu else "tiny")
    if size != "tiny" and not (on_gpu and find_spec("vllm")):
        parser.error(f"--size {size} needs a GPU and vLLM; here: {device()}, vLLM {find_spec('vllm') and 'there'}")
    rows = chosen(options.rows, ROWS, "rows", parser) or (
        ["padded", "padded overlay"] if size == "tiny" else ["overlay", "flash-attn", "padded"]
    )
    variants = chosen(options.variants, VARIANTS, "variants", parser) or [""]
    folder = options.folder.resolve()
    plan = Plan(folder / size, size, options.gpus, options.steps, options.turns, options.eager, options.batch)
    # Two would tell each other's runs that it is their turn, and mix their logs.
    lock = locked(folder, "another grpo.py, or by a run of one that was killed, which ends with its turn")
    begun = time.monotonic()
    prepare(plan, options.lessons)
    if options.prepare:
        return 0
    turns = folder / "turns"
    turns.mkdir(exist_ok=True)
    runs = [Run(row, variant, folder) for variant in variants for row in rows]
    runs = [replace(run, folder=folder / run.file_name) for run in runs]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs are in sessions of their own, and would go on
    started: list[Started] = []
    try:
        for run in runs:
            started.append(Started(run, plan, turns, lock))
        take_turns(started, plan, begun + 60 * options.minutes)
    finally:
        end(started)
        results = {each.run.name: each.result() for each in started}
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print(report(results))
    wrong = disagreements(results)
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
