"""``config``: what has to be exported, and what verl has to be told, to train a model on a chip; and why."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from verl_fl_overlay import compat
from verl_fl_overlay.cli import model_folder, terminal
from verl_fl_overlay.cli.model_folder import Model, ModelError
from verl_fl_overlay.compat.release import overrides, sources
from verl_fl_overlay.compat.release.overrides import Job
from verl_fl_overlay.devices import chips
from verl_fl_overlay.devices.chips import Chip
from verl_fl_overlay.errors import OverlayError, UnsupportedVerlError, nearest
from verl_fl_overlay.packages import installed
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.loading import LOADED_BY, with_overlay
from verl_fl_overlay.settings.plugins import SGLANG, VLLM
from verl_fl_overlay.settings.variables import names

ROLLOUTS = {"vllm": VLLM, "sglang": SGLANG}

LAYER_KERNELS = ("fla", "causal_conv1d")
"""The packages with kernels that keep packed sequences apart in layers without attention."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = "What is printed can be pasted into a shell or a job script; it is only what verl does not do by itself."
    examples = (
        "verl-fl config MODEL --task grpo --engine fsdp2 > train.sh",
        "verl-fl config --verl 0.8.0 --chip metax --task ppo --rollout sglang",
        "verl-fl config --verl 0.9.1 --chip cpu --task sft --json",
    )
    terminal.explain(parser, more, examples=examples, exits={0: "printed"})
    vendors = ", ".join([*chips.CHIPS, chips.CPU.vendor])
    model = "a model's folder, Hugging Face format (default: a place to fill in)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    parser.add_argument("--verl", metavar="RELEASE", help="for this release (default: the one that is installed)")
    parser.add_argument("--chip", metavar="VENDOR", help=f"one of {vendors} (default: the one that is found here)")
    parser.add_argument("--task", choices=overrides.TASKS, default="grpo", help="what to train (default: %(default)s)")
    engine = "what computes the training (default: %(default)s, which is verl's own)"
    parser.add_argument("--engine", choices=overrides.ENGINES, default="fsdp", help=engine)
    parser.add_argument("--rollout", choices=[*ROLLOUTS], default="vllm", help="what generates (default: %(default)s)")
    for part in ("prompt", "response"):
        limit = f"tokens of the longest {part} (default: verl's {overrides.LENGTH})"
        parser.add_argument(f"--{part}", type=int, metavar="TOKENS", help=limit)
    parser.add_argument("--json", action="store_true", help="print JSON (default: shell)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the configuration.

    Raises:
        OverlayError: the release, the chip or the model is not known, or they cannot be trained together.
    """
    found = examine(options)
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


@dataclass(frozen=True)
class Export:
    """A variable, its value, and the reason in a line."""

    name: str
    value: str
    why: str


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """Return the exports, the overrides and the command for what the options ask for."""
    release = _release(options.verl)
    chip, told_by = _chip(options.chip)
    model = None if options.model is None else model_folder.opened(options.model)
    for part in ("prompt", "response"):
        given = getattr(options, part)
        if given is not None and given < 1:
            raise OverlayError(f"--{part} {given}: allowed is 1 or more")
    job = Job(
        release,
        options.task,
        options.engine,
        options.rollout,
        chip.device,
        _path(model) if model else "",
        options.prompt,
        options.response,
        packs=model is None or not model.layers_without_attention or all(map(installed, LAYER_KERNELS)),
        has_te=installed("transformer_engine"),
        sleeps=options.rollout != "vllm" or not _needs_plugin(chip),
    )
    _refuse(job, chip, model)
    return {
        "verl": str(release),
        "chip": {"vendor": chip.vendor, "told by": told_by},
        **{name: getattr(options, name) for name in ("task", "engine", "rollout")},
        "exports": [asdict(export) for export in _exports(job, chip)],
        "overrides": [asdict(override) for override in overrides.overrides(job)],
        "left to you": overrides.left_to_user(job),
        "command": overrides.command(job),
        "notes": list(_notes(job, chip, model)),
    }


def _path(model: Model) -> str:
    folder = os.path.abspath(model.folder)
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"{folder!r} is no UTF-8, in which verl reads its overrides; rename the folder") from error
    return folder


def _release(named: str | None) -> Version:
    if named is None:
        found = compat.find_verl()
        if found is None:
            raise UnsupportedVerlError(f"no verl is installed here; name a release: --verl {compat.RELEASES[-1]}")
        named = compat.select(found).version
    try:
        release = Version(named)
    except InvalidVersion as error:
        raise OverlayError(f"--verl {named}: needed is a version, such as {compat.RELEASES[-1]}") from error
    sources.refuse_older(named)
    return release


def _chip(named: str | None) -> tuple[Chip, str]:
    if named is None:
        settings, _ = Settings.parse()
        chip, told_by = chips.chosen(settings)
        if chip is None:
            raise OverlayError(f"no chip is found here ({told_by}); name one: --chip nvidia, or --chip cpu")
        return chip, told_by
    known = {**chips.CHIPS, chips.CPU.vendor: chips.CPU}
    if named.lower() not in known:
        raise OverlayError(f"--chip {named} is not known{nearest(named, known)}; allowed are {', '.join(known)}")
    return known[named.lower()], "--chip"


def _refuse(job: Job, chip: Chip, model: Model | None) -> None:
    own_device = chip.vendor not in chips.KNOWN_TO_VERL and chip.device != "cuda"
    if job.line < (0, 9) and job.task != "sft" and own_device:
        raise OverlayError(
            f"verl {job.release} asks Ray only for GPUs and NPUs, so {chip.vendor} trains there under torchrun alone: "
            "--task sft, or verl >= 0.9.0"
        )
    if model is None:
        return
    if model.positions is not None and job.longest > model.positions:
        raise ModelError(
            f"{job.longest} tokens of prompt and response are more than the {model.positions} positions of "
            f"{model.folder / model_folder.CONFIG}; give less with --prompt and --response"
        )
    if model.words and model.vocabulary and model.words > model.vocabulary:
        raise ModelError(
            f"{model.folder} has a tokenizer with {model.words} tokens and a model with a vocabulary of "
            f"{model.vocabulary}: a token beyond that has no row in it; enlarge the model's embedding first"
        )


def _exports(job: Job, chip: Chip) -> Iterator[Export]:
    yield Export(LOADED_BY, with_overlay(os.environ), "verl loads the overlay in every process")
    if chip is chips.CPU:
        yield Export("VERL_FL_DEVICE", "cpu", "verl itself does not train on a CPU")
    elif chip.vendor not in chips.KNOWN_TO_VERL and (job.line >= (0, 9) or chip.device != "cuda"):
        yield Export("VERL_PLATFORM", chip.vendor, "verl does not know this chip; the overlay brings what it asks for")
    if not chip.backend:
        yield Export(
            "USE_FLAGCX", "1", "torch has no other collectives for this chip; FLAGCX_PATH says where FlagCX is"
        )
    plugin = ROLLOUTS[job.rollout]
    if job.task != "sft" and _needs_plugin(chip):
        listed = names(os.environ.get(plugin.switch, ""))
        value = ",".join(listed if plugin.entry in listed else (*listed, plugin.entry))
        yield Export(plugin.switch, value, f"{plugin.engine} runs on this chip with {plugin.name}, and no other plugin")


def _needs_plugin(chip: Chip) -> bool:
    """Return whether what generates runs on the chip with FlagOS' plugin only."""
    return chip is not chips.CPU and chip.vendor not in chips.KNOWN_TO_VERL


def _notes(job: Job, chip: Chip, model: Model | None) -> Iterator[str]:
    if str(job.release) not in compat.RELEASES:
        yield f"verl {job.release} was not tested; verl-fl check {job.release} tells whether the hooks hold"
    yield f"not needed: {', '.join(overrides.not_needed(job))}; verl's defaults run with the overlay"
    if chip is chips.CPU and job.task != "sft":
        engine = ROLLOUTS[job.rollout].engine
        yield f"rollout on a CPU was not run with this package, and needs {engine}'s build for CPUs"
    if job.line < (0, 8) and job.engine == "megatron" and job.task != "sft":
        yield "the Megatron workers of this release were not run with the overlay; those of 0.8.0 and later were"
    if model is not None and model.words and model.vocabulary and model.words < model.vocabulary:
        yield (
            f"the tokenizer has {model.words} tokens, the model {model.vocabulary}: rollout never draws the "
            "others, which matters only for a model that is hardly trained"
        )


def as_text(found: dict[str, Any]) -> str:
    """Lay the configuration out as lines of a shell, the reason above each."""
    chip, generates = found["chip"], "" if found["task"] == "sft" else f", answers from {found['rollout']}"
    lines = [
        f"# verl {found['verl']} on {chip['vendor']} ({chip['told by']}): {found['task']}, {found['engine']}{generates}"
    ]
    for export in found["exports"]:
        lines += [f"# {export['why']}", f"export {export['name']}={shlex.quote(export['value'])}"]
    lines.append("overrides=(")
    for override in found["overrides"]:
        text = f"{override['key']}={override['value']}"
        lines += [f"    # {override['why']}", f"    {shlex.quote(text)}"]
    lines += [")", *(f"# {note}" for note in found["notes"])]
    lines.append(f"# yours, behind the command: {' '.join(f'{key}=...' for key in found['left to you'])}")
    return "\n".join([*lines, f'{found["command"]} "${{overrides[@]}}" "$@"'])
