"""The command line: ``verl-fl`` or ``python -m verl_fl_overlay``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from verl_fl_overlay import __version__
from verl_fl_overlay.errors import OverlayError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status: 2 with a line that says why, where the overlay refuses."""
    parser = argparse.ArgumentParser(prog="verl-fl", description="verl with FlagOS, as an overlay of hooks.")
    parser.add_argument("--version", action="version", version=f"verl-fl-overlay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="try every hook on the verl that is here and report")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    ops = commands.add_parser("ops", help="list the operators of the FlagGems that is here, and which training may use")
    ops.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or with * and ?")
    ops.add_argument("--json", action="store_true", help="print JSON")
    ops.add_argument("--unsafe", action="store_true", help="only those that training must not use")
    ops.set_defaults(run=_ops)
    env = commands.add_parser("env", help="show every variable of the stack, what it does and what is wrong with it")
    env.add_argument("--phase", choices=["training", "rollout"], default="", help="leave out what only the other reads")
    form = env.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--sh", action="store_true", help="print the variables that are set as shell exports")
    env.set_defaults(run=_env)

    dispatch = commands.add_parser("dispatch", help="check or write vllm-plugin-FL's dispatch file")
    actions = dispatch.add_subparsers(dest="action", required=True, metavar="ACTION")
    dispatch_check = actions.add_parser("check", help="say what the plugin would ignore or take for something else")
    dispatch_check.add_argument("file", type=Path)
    dispatch_check.set_defaults(run=_dispatch_check)
    render = actions.add_parser("render", help="print the file that does what the environment asks for")
    render.add_argument("--vendor", default="", help="FlagGems' name of the chip's vendor; found, if not given")
    render.set_defaults(run=_dispatch_render)

    target = "a version, 'latest', a wheel, an sdist, the folder in which verl/ lies, or CHECKOUT@REF"
    check = commands.add_parser("check", help="say whether the hooks hold on a verl release, from its source alone")
    check.add_argument("target", help=target)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--against", metavar="RELEASE", help="the pinned release to compare with (default: the nearest)")
    check.set_defaults(run=_check)

    pin = commands.add_parser("pin", help="print the pins of a verl release, from its source alone")
    pin.add_argument("target", help=target)
    pin.add_argument("--write", action="store_true", help="write them to compat/pins/VERSION.json of this checkout")
    pin.set_defaults(run=_pin)

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
    tune.set_defaults(run=_tune)

    warmup = commands.add_parser("warmup", help="fill the kernels' caches: run one step in this environment")
    warmup.add_argument("model", help="a model's folder, Hugging Face format")
    warmup.add_argument("--rows", type=int, default=2, help="sequences in the batch (default: %(default)s)")
    warmup.add_argument("--length", type=int, default=1024, help="tokens in the longest of them (default: %(default)s)")
    warmup.set_defaults(run=_warmup)

    parity = commands.add_parser("parity", help="compare a step with and without the overlay, on the same weights")
    parity.add_argument("model", help="a model's folder, Hugging Face format")
    parity.add_argument("--rows", type=int, default=4, help="sequences in the batch (default: %(default)s)")
    parity.add_argument("--length", type=int, default=256, help="tokens in the longest of them (default: %(default)s)")
    parity.add_argument(
        "--micro-batch", type=int, default=2, help="sequences computed at a time (default: %(default)s)"
    )
    parity.add_argument("--seed", type=int, default=0, help="of the random tokens (default: %(default)s)")
    parity.add_argument("--json", action="store_true", help="print JSON")
    parity.set_defaults(run=_parity)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except OverlayError as error:
        refusal = str(error)
    except ModuleNotFoundError as error:
        if error.name != "torch":  # an extra, and what runs a step or a kernel needs it
            raise
        refusal = "torch is not installed: pip install torch"
    command = " ".join(filter(None, (options.command, getattr(options, "action", ""))))
    print(f"verl-fl {command}: {refusal}", file=sys.stderr)
    return 2


def _doctor(options: argparse.Namespace) -> int:
    from verl_fl_overlay.cli import doctor

    doctor.quiet()
    result, usable = doctor.examine()
    print(json.dumps(result, indent=1) if options.json else doctor.as_text(result))
    return 0 if usable else 1


def _ops(options: argparse.Namespace) -> int:
    from verl_fl_overlay.cli import ops as listing

    found = listing.operators(options.pattern, options.unsafe)
    if options.json:
        print(json.dumps(found, indent=1))
    elif found:
        print(listing.as_text(found))
    else:
        print(f"no operator matches {options.pattern!r}" if options.pattern else "no operators", file=sys.stderr)
    return 0 if found else 1


def _env(options: argparse.Namespace) -> int:
    from verl_fl_overlay.settings import environment

    result = environment.examine(os.environ, options.phase)
    if options.sh:
        print(environment.as_exports(os.environ, options.phase))
        for error in result["errors"]:
            print(f"verl-fl env: {error}", file=sys.stderr)
    else:
        print(environment.as_json(result) if options.json else environment.as_text(result))
    return 1 if result["errors"] else 0


def _dispatch_check(options: argparse.Namespace) -> int:
    from verl_fl_overlay.dispatch import vllm_fl

    try:
        findings = vllm_fl.check(vllm_fl.read(options.file))
    except OverlayError as error:
        findings = [str(error)]
    faults = [finding for finding in findings if not finding.startswith(vllm_fl.NOTE)]
    print("\n".join([*findings, *([] if faults else [f"{options.file}: no faults"])]))
    return 1 if faults else 0


def _dispatch_render(options: argparse.Namespace) -> int:
    from verl_fl_overlay.dispatch import vllm_fl
    from verl_fl_overlay.settings import Settings

    print(vllm_fl.render(Settings.from_environment(), options.vendor), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat.release import check, sources

    with sources.opened(options.target) as tree, sources.PinnedReleases() as pinned:
        report = check.check(tree, options.against, pinned.tree)
    print(json.dumps(check.as_json(report), indent=1) if options.json else check.as_text(report))
    return 0 if report.holds else 1


def _pin(options: argparse.Namespace) -> int:
    from verl_fl_overlay.compat.release import pinning, sources

    folder = Path(pinning.__file__).resolve().parent.parent  # verl_fl_overlay/compat of a checkout is a link
    if options.write and not (folder.parent / "pyproject.toml").is_file():
        raise OverlayError(f"--write is for a checkout, and {folder} is in none; there: pip install -e .")
    with sources.opened(options.target) as tree:
        pins = pinning.pins_of(tree)
    if options.write:
        file = folder / "pins" / f"{pins['verl']}.json"
        file.write_text(pinning.as_text(pins), encoding="utf-8")
        print(file)
    else:
        print(pinning.as_text(pins), end="")
    return 0


def _parity(options: argparse.Namespace) -> int:
    from verl_fl_overlay.cli import parity

    trial = parity.Trial(options.model, options.rows, options.length, options.micro_batch, options.seed)
    result = parity.examine(trial)
    print(json.dumps(result, indent=1) if options.json else parity.as_text(result))
    return 0 if result["same"] else 1


def _tune(options: argparse.Namespace) -> int:
    from verl_fl_overlay.flaggems import profile as profiles

    try:
        if options.show:
            profile = profiles.load(options.out)
        elif options.model is None:
            print("verl-fl tune: a model's folder is needed, or --show with a profile", file=sys.stderr)
            return 2
        else:
            from verl_fl_overlay.flaggems.tuning import tune
            from verl_fl_overlay.settings.readers import names

            shape = {"rows": options.rows, "length": options.length, "micro_batch": options.micro_batch}
            profile = tune.tune_model(options.model, options.out, **shape, skip=names(options.skip))
    except KeyboardInterrupt:
        left = f"{options.out} holds what was measured and is gone on with"
        print(f"verl-fl tune: interrupted; {left if options.out.exists() else 'nothing was measured'}", file=sys.stderr)
        return 130
    print(profiles.as_text(profile))
    if options.plot:
        from verl_fl_overlay.flaggems.tuning.plot import plot

        plot(profile, options.plot)
    return 0


def _warmup(options: argparse.Namespace) -> int:
    import time

    from verl_fl_overlay.cli import parity

    begun = time.perf_counter()
    trial = parity.Trial(options.model, options.rows, options.length, micro_batch=options.rows)
    used = parity.kernels_of(parity.run_with_overlay(trial))
    print(f"one step of {options.model} in {time.perf_counter() - begun:.0f} s: the kernels it needs are in the caches")
    print(f"  log-probs: {used['logprobs'].get('kernels', {}) if 'logprobs' in used else 'off'}")
    print(f"  fused modules: {used['fused'].get('checks', {}) if 'fused' in used else 'off'}")
    return 0
