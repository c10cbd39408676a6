"""``tune``: which operators are faster from FlagGems, measured in a training step of the user's model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from verl_fl_overlay.cli import model_folder, terminal
from verl_fl_overlay.compat.trial import Trial, steps
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.flaggems.profile import Profile
from verl_fl_overlay.packages import installed
from verl_fl_overlay.settings.variables import names


def add(tune: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "Each operator of one training step is timed at the step's shapes, native and from FlagGems; of the faster "
        "ones those are chosen that make whole steps faster. It takes minutes and needs verl, FlagGems and the chip. "
        "Export VERL_FL_PROFILE=profile.json to use the result."
    )
    examples = (
        "verl-fl tune MODEL --rows 4 --length 2048",
        "verl-fl tune MODEL --skip mm,bmm --out other.json",
        "verl-fl tune --show --out profile.json --plot profile.png",
    )
    exits = {0: "the profile was made, or shown", terminal.INTERRUPTED: "interrupted; the same command goes on"}
    terminal.explain(tune, more, examples=examples, exits=exits)
    model = "a model's folder, Hugging Face format; not needed with --show"
    tune.add_argument("model", nargs="?", metavar="MODEL", help=model)
    model_folder.add_batch(tune, rows=8, length=1024, micro_batch=4)
    skip = "functions that are not measured, comma-separated; mm autotunes long (default: none)"
    tune.add_argument("--skip", default="", metavar="NAMES", help=skip)
    out = "the profile, a JSON file; one begun is gone on with (default: %(default)s)"
    tune.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help=out)
    show = "only print the table of the profile --out (default: measure)"
    tune.add_argument("--show", action="store_true", help=show)
    tune.add_argument("--plot", type=Path, metavar="FILE", help="draw it as a PNG into this file (default: no picture)")
    terminal.add_wide(tune)
    tune.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, or show what was measured; return 130 after an interruption.

    Raises:
        OverlayError: the options contradict, or a file or the model cannot be used.
    """
    from verl_fl_overlay.flaggems import profile as profiles

    _refuse_files(options)
    try:
        if options.show and options.model:
            raise OverlayError("--show measures nothing: leave the model out, or --show")
        if options.show:
            profile = profiles.load(options.out)
        elif options.model is None:
            raise OverlayError("a model's folder is needed, or --show with a profile")
        else:
            shape = {"rows": options.rows, "length": options.length, "micro_batch": options.micro_batch}
            profile = tune_model(options.model, options.out, **shape, skip=names(options.skip))
    except KeyboardInterrupt:
        left = f"{options.out} holds what was measured and is gone on with"
        print(f"verl-fl tune: interrupted; {left if options.out.exists() else 'nothing was measured'}", file=sys.stderr)
        return terminal.INTERRUPTED
    print("\n".join(as_text(profile, options.wide)))
    if options.plot:
        from verl_fl_overlay.flaggems.tuning.plot import plot

        plot(profile, options.plot)
    return 0


def _refuse_files(options: argparse.Namespace) -> None:
    """Refuse what could not be read, written or drawn, before minutes of measuring."""
    written = [("--plot", options.plot), ("--out", None if options.show else options.out)]
    for option, file in (*written, ("--out", options.out)):
        if file and file.exists() and not file.is_file():
            raise OverlayError(f"{option} {file} is no file; name one that is a file, or is not there yet")
    for option, file in written:
        if file and not os.access(file.parent, os.W_OK):
            raise OverlayError(f"{option} {file}: its folder is not there, or cannot be written; name another")
    if options.plot and not installed("matplotlib"):
        raise OverlayError("--plot needs matplotlib: pip install matplotlib")


def as_text(profile: Profile, wide: bool = False) -> list[str]:
    """Return the lines of a profile as a table: operator, calls, native, FlagGems, chosen."""
    rows = [
        (
            one.key,
            str(one.calls),
            f"{one.native_ms:.3f}",
            f"{one.flaggems_ms:.3f}",
            terminal.Good("yes") if one.name in profile.chosen else one.note or "no",
        )
        for one in sorted(profile.measurements, key=lambda one: -one.native_ms)
    ]
    return [
        *terminal.sentences([str(profile.key), profile.workload], wide=wide),
        *terminal.table(("operator", "calls", "native ms", "FlagGems ms", "chosen"), rows, wide=wide),
        *(f"whole step, {name}: {time:.1f} ms" for name, time in profile.step_ms.items()),
    ]


def tune_model(
    model: str,
    file: Path,
    *,
    rows: int,
    length: int,
    micro_batch: int,
    skip: tuple[str, ...] = (),
    say: Any = terminal.progress,
) -> Any:
    """Tune for a model's folder: ``rows`` sequences of at most ``length`` tokens a step, in verl's FSDP2 engine.

    Fused modules and log-probs are as the job will have them; no operator is routed while it is recorded.

    Raises:
        ModelError: the model's folder cannot be used, or the batch does not fit the model.
        FlagGemsError: FlagGems cannot be used here.
        ProfileError: ``file`` is there and damaged or another's, or cannot be written.
        SettingsError: ``skip`` names what FlagGems does not have.
    """
    checked = model_folder.checked(Trial(model, rows, length, micro_batch))  # before torch is imported
    from verl_fl_overlay.flaggems import library
    from verl_fl_overlay.flaggems.names import check
    from verl_fl_overlay.flaggems.profile import key_here
    from verl_fl_overlay.flaggems.tuning.tune import tune

    for variable in ("USE_FLAGGEMS", "TRAINING_FL_FLAGGEMS_ENABLE"):
        os.environ.pop(variable, None)
    gems = library.load()
    check(skip, "--skip", gems)
    with terminal.step("verl's engine is built on the model"):
        step = steps(checked)
    say("a step is run and its operators are measured, a line for each ...")
    workload = f"{model}: {rows} sequences of up to {length} tokens, {micro_batch} at a time"
    return tune(step, gems, key_here(), workload, file, skip=skip, say=say)
