"""``tune``: which operators are faster from FlagGems, measured in a training step of the user's model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from verl_fl_overlay.cli import model_folder
from verl_fl_overlay.compat.trial import Trial, steps
from verl_fl_overlay.settings.variables import names


def add(commands: Any) -> None:
    """Add the command."""
    tune = commands.add_parser("tune", help="measure which operators are faster from FlagGems, for a model")
    tune.add_argument("model", nargs="?", help="a model's folder, Hugging Face format")
    tune.add_argument("--rows", type=int, default=8, help="sequences a step (default: %(default)s)")
    tune.add_argument("--length", type=int, default=1024, help="tokens in the longest of them (default: %(default)s)")
    tune.add_argument("--micro-batch", type=int, default=4, help="sequences computed at a time (default: %(default)s)")
    tune.add_argument("--skip", default="", help="functions that are not measured, comma-separated (mm autotunes long)")
    out = "the profile; one begun is gone on with (default: %(default)s)"
    tune.add_argument("--out", type=Path, default=Path("profile.json"), help=out)
    tune.add_argument("--show", action="store_true", help="only print the table of the profile --out")
    tune.add_argument("--plot", type=Path, help="draw it, as a PNG")
    tune.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, or show what was measured; return 130 after an interruption."""
    from verl_fl_overlay.flaggems import profile as profiles

    try:
        if options.show and options.model:
            print("verl-fl tune: --show measures nothing: leave the model out, or --show", file=sys.stderr)
            return 2
        if options.show:
            profile = profiles.load(options.out)
        elif options.model is None:
            print("verl-fl tune: a model's folder is needed, or --show with a profile", file=sys.stderr)
            return 2
        else:
            shape = {"rows": options.rows, "length": options.length, "micro_batch": options.micro_batch}
            profile = tune_model(options.model, options.out, **shape, skip=names(options.skip))
    except KeyboardInterrupt:
        left = f"{options.out} holds what was measured and is gone on with"
        print(f"verl-fl tune: interrupted; {left if options.out.exists() else 'nothing was measured'}", file=sys.stderr)
        return 130
    print(profiles.as_text(profile))
    if options.plot:
        from verl_fl_overlay.flaggems.tuning.plot import plot

        plot(profile, options.plot)
    return 0


def tune_model(
    model: str, file: Path, *, rows: int, length: int, micro_batch: int, skip: tuple[str, ...] = (), say: Any = print
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
    step = steps(checked)
    workload = f"{model}: {rows} sequences of up to {length} tokens, {micro_batch} at a time"
    return tune(step, gems, key_here(), workload, file, skip=skip, say=say)
