"""``doctor``: what the overlay does with the verl that is here; every hook is really installed.

What the settings ask for is really imported, too.  The check of verl's files is that of ``verl-fl check``, so the two
commands cannot disagree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from verl_fl_overlay import activation, compat
from verl_fl_overlay.cli import env, install_hint, run_reports, standard_output, terminal
from verl_fl_overlay.cli.attempt import Result, attempt, one_line, reason
from verl_fl_overlay.cli.check import pinned
from verl_fl_overlay.cli.components import ACCELERATOR, COMPONENTS, Component
from verl_fl_overlay.compat.pins import VERL
from verl_fl_overlay.compat.release import check, sources
from verl_fl_overlay.compat.release.check import Comparison, Outcome, Status
from verl_fl_overlay.errors import HookError, OverlayError, UnsupportedVerlError, first_line
from verl_fl_overlay.files import this_process
from verl_fl_overlay.hooks import HookStatus, State
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.packages import folders, installed
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.loading import LOADED_BY, OVERLAY, forwarded, modules
from verl_fl_overlay.versions import VERSIONS, Unmet, misfits, unmet, versions

NEEDED = ("verl", "verl-fl-overlay")
"""The distributions without which nothing trains with the overlay."""

TIMEOUT = 180.0
"""Seconds that the import of a component may take."""

NOT_NEEDED = "not needed here"
"""How the detail of a hook begins whose package is not installed."""


def add(doctor: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "verl is imported, every hook is put on, and each component that the environment asks for (FlagGems, FlagCX, "
        "the plugins for rollout, ...) is tried in a process of its own. Run it where training is to run, with the "
        "job's environment. --reports sums up what the processes of a run reported instead."
    )
    examples = (
        "verl-fl doctor",
        "verl-fl doctor --json > doctor.json",
        "verl-fl doctor --all --wide | grep attention",
        "verl-fl doctor --reports reports  # after a run, VERL_FL_REPORT_DIR=reports",
    )
    exits = {
        0: "training can go on with the overlay and all that is asked for",
        1: "it cannot; with --reports: no process trained, or one has a problem",
    }
    terminal.explain(doctor, more, examples=examples, exits=exits)
    every = "list every hook with its target (default: those to look at)"
    doctor.add_argument("--all", action="store_true", help=every)
    limit = "how long a component may take to be imported, seconds above 0 (default: %(default)g)"
    doctor.add_argument("--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", help=limit)
    reports = "sum up the reports in this folder, which a run wrote to VERL_FL_REPORT_DIR (default: try everything)"
    doctor.add_argument("--reports", metavar="DIR", help=reports)
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with every hook (default: tables)")
    terminal.add_wide(form)
    doctor.set_defaults(run=run)


def _seconds(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return float(text)


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 if training cannot go on with the overlay, or would go on without what is asked for.

    Of the reports of a run, return 1 if no process trained, or one has a problem.

    Raises:
        OverlayError: there are no reports to sum up.
    """
    if options.reports is not None:
        summed = run_reports.summed_up(options.reports)
        print(json.dumps(summed, indent=1) if options.json else run_reports.as_text(summed, options.wide))
        return 1 if summed["problems"] or not summed["trained"] else 0
    quiet()
    folder = Settings.parse()[0].report_dir
    made = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()] if folder else []
    with standard_output.kept():
        result, usable = examine(options.timeout)
    print(json.dumps(result, indent=1) if options.json else as_text(result, options.all, options.wide))
    _leave_no_report(made)
    return 0 if usable else 1


def _leave_no_report(made: Sequence[Path]) -> None:
    """Take back the report of this process and the folders that it ``made``: it is no part of a run."""
    active = activation.active()
    if active is not None and active.report_file is not None and not active.report_file.fault:
        activation.deactivate()
        (Path(active.settings.report_dir) / f"{this_process()}.json").unlink(missing_ok=True)
    with suppress(OSError):  # not empty, since a run writes there now
        for place in made:
            place.rmdir()


def examine(timeout: float = TIMEOUT) -> tuple[dict[str, Any], bool]:
    """Import verl, the modules of all hooks and what the settings ask for; return the report and whether all is well.

    All is well if training can go on with the overlay and with all that is asked for.
    """
    settings, _ = Settings.parse()
    asked = {component: by for component in COMPONENTS if (by := component.asked(settings))}
    with ExitStack() as running:
        attempts = {component: running.enter_context(attempt(component.attempt)) for component in asked}
        result, usable = _examine_verl()
        results = {component: tried.result(timeout) for component, tried in attempts.items()}
    known = versions()
    itself = {name: text for tried in results.values() for name, text in tried.told.get("versions", {}).items()}
    here = {**known, **itself}  # what a component says itself goes before its metadata
    result["versions"] = {
        module: told if told == known.get(module) else f"{told} (its metadata say {known.get(module, 'nothing')})"
        for module, told in here.items()
    }
    result["overlay folder"] = folders("verl_fl_overlay")[0]
    result["components"] = {
        component.name: {"asked for by": asked[component], "fault": tried.fault, **tried.told}
        for component, tried in results.items()
    }
    if ACCELERATOR in result["components"]:
        result["device"] = result["components"][ACCELERATOR].get("device", "none")
    release = str(result["verl"]["version"])
    broken, harmless, unable = _requirements(asked, here, release)
    result["notes"] += harmless
    result["problems"] += misfits(("torch", "numpy"), here, release)
    for component, tried in results.items():
        fits = misfits(component.modules, here, release)
        told = [_fault(component, asked[component], tried), tried.told.get("conflict", ""), *fits]
        so_far = [one_line(problem) for problem in result["problems"]]
        result["problems"] += [text for text in told if text and one_line(text) not in "\n".join(so_far)]
    result["problems"] += broken
    return result, usable and not unable and not any(tried.fault for tried in results.values())


def _requirements(
    asked: Iterable[Component], here: Mapping[str, str], release: str
) -> tuple[list[str], list[str], bool]:
    """Return the unmet requirements that are problems, those that are notes, and whether one stops the training.

    A problem is a wrong version of what verl, the overlay or a component that is asked for requires itself; verl and
    the overlay cannot do with one.  What is missing altogether is a note: a module that cannot be imported is told
    where it is needed.
    """
    modules = {module for component in asked for module in component.modules}
    found = list(unmet([*NEEDED, *(name for module in modules for name in VERSIONS[module])], here))
    wrong = [one for one in found if one.here and not one.deep and not install_hint.harmless(one)]
    own = [one for one in wrong if one.whose in NEEDED]
    problems = [f"{one}{_way_out(one, release)}" for one in wrong]
    return problems, [str(one) for one in found if one not in wrong], bool(own)


def _way_out(one: Unmet, release: str) -> str:
    """Return the line that gives verl, or the overlay, the version that it asks for."""
    if one.whose not in NEEDED:
        return ""
    fitting = shlex.quote(f"{one.other}{one.fitting}")
    return f". Put it right with: {' '.join(filter(None, ('pip install', install_hint.held(release), fitting)))}"


def _fault(component: Component, by: str, tried: Result) -> str:
    """Return that a component cannot be used, why, and what training does then; "" if it can be used."""
    without = "Training would end or hang there too" if tried.ended else component.without
    if not tried.fault or not without:
        return tried.fault
    return f"{component.name} is asked for ({by}) and cannot be used: {tried.fault}. {without}"


def _examine_verl() -> tuple[dict[str, Any], bool]:
    """Import verl and the modules of all hooks; return the report and whether training can go on with the overlay."""
    refusals: list[str] = []
    by_verl = False  # whether a refusal is about verl itself
    notes: dict[str, str] = {}
    found: check.Report | None = None
    try:
        _import_verl()
        hooks = activation.activate().hooks
        found = _checked()
        for status in hooks.report():
            fault = _import_target(status)
            if fault and not _serves(status):
                notes[status.hook.name] = f"{NOT_NEEDED}: {status.hook.needs} is not installed"
            elif fault:
                notes[status.hook.name] = fault
                refusals += [f"hook {status.hook.name} cannot be tried: {fault}"] if status.hook.required else []
    except OverlayError as error:
        refusals.append(str(error))
        by_verl = isinstance(error, UnsupportedVerlError | HookError)
    findings = {finding.hook.name: finding for finding in found.findings} if found else {}
    active = activation.active()
    untold = _rehearse(active) if active else ""
    for status in active.hooks.report() if active else []:
        finding = findings.get(status.hook.name)
        named = any(f"hook {status.hook.name!r}" in refusal for refusal in refusals)  # what the process itself refused
        if finding and finding.fatal and _serves(status) and not named:
            refusals.append(f"hook {status.hook.name}: {finding.meaning}")
            by_verl = True
    result = activation.report()
    for hook in result["hooks"]:
        finding = findings.get(hook["name"])
        hook["pinned"] = _pinned(finding.target) if finding else "-"
        hook["outcome"] = finding.outcome.value if finding else ""
        follows = finding.meaning if finding and finding.outcome is Outcome.WITHOUT else ""
        hook["detail"] = hook["detail"] or notes.get(hook["name"], follows)
    result["packages"] = check.packages(found) if found else {}
    unloaded, by_another = _unloaded(active.shim.version) if active else ("", False)
    result["problems"] += [told for told in (unloaded, untold) if told]
    if by_verl:
        result["verl"]["supported"] = False
    checked = env.examine(os.environ)
    others = dict.fromkeys([*checked["errors"], *result["problems"]])
    if refusals:  # an overlay that is off has not checked it
        others |= dict.fromkeys(checked["warnings"])
        others = {p: None for p in others if not p.startswith("the overlay is not active")}
    result["problems"] = refusals + [p for p in others if not any(p.partition(": ")[0] in r for r in refusals)]
    reported = not (active and active.report_file and active.report_file.fault)
    return result, not refusals and not checked["errors"] and reported and (not unloaded or by_another)


def _checked() -> check.Report | None:
    """Return what ``verl-fl check`` finds in the files of this verl; None if they cannot be read."""
    tree = sources.installed(VERL)
    return check.check(tree) if tree else None


def _serves(status: HookStatus) -> bool:
    """Return whether this process uses the hook: it is not left out, and the package that it needs is installed."""
    return status.state is not State.DISABLED and (not status.hook.needs or installed(status.hook.needs))


def _rehearse(active: Overlay) -> str:
    """Let the features act once, so that the report tells what they use here; return what went wrong in it."""
    try:
        active.features.rehearse()
    except Exception as error:  # whatever torch and the chip raise
        return f"attention cannot be tried here: {first_line(error)}"
    return ""


def _import_verl() -> None:
    try:
        importlib.import_module("verl")
    except OverlayError:
        raise
    except Exception as error:  # whatever verl raises, or another module that VERL_USE_EXTERNAL_MODULES names
        missing = isinstance(error, ImportError) and error.name == "verl"
        needed = f"Needed is verl >= {compat.OLDEST}: verl-fl install-hint verl"
        advice = needed if missing else "Where it fails: python -c 'import verl'"
        raise OverlayError(f"verl cannot be imported: {reason(error)}{_raised_in(error)}. {advice}") from error


def _raised_in(error: Exception) -> str:
    """Return ", raised in torch" where another package than verl raised it, "" where it is verl itself."""
    modules_passed = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [package for name in modules_passed if (package := name.partition(".")[0]) not in _IMPORTERS]
    return f", raised in {packages[-1]}" if packages and packages[-1] != "verl" else ""


_IMPORTERS = ("", "importlib", "wrapt", "verl_fl_overlay")
"""What stands in the traceback of every import."""


def _unloaded(version: str) -> tuple[str, bool]:
    """Return what to export if verl does not load the overlay in training, and whether another module may load it."""
    listed = modules(os.environ)
    if OVERLAY in listed or compat.finds_plugin(version, OVERLAY):
        return "", False
    needed = forwarded(os.environ)[LOADED_BY]
    unless = f", unless {' or '.join(listed)} imports it" if listed else ""
    said = f"verl {version} does not load the overlay in training{unless}: export {LOADED_BY}={needed}"
    return said, bool(listed)


def _import_target(status: HookStatus) -> str:
    """Import the module that a hook waits for; if that fails, return the reason in one line, else ""."""
    if status.state is not State.WAITING:
        return ""
    module = status.hook.module
    try:
        importlib.import_module(module)
    except OverlayError:
        raise
    except Exception as error:  # whatever a third-party module raises while it is imported
        if status.state is State.WAITING:
            return f"import of {module} raises {first_line(error)}"
    return f"{module} was imported, and the hook was not called to it" if status.state is State.WAITING else ""


_PINNED = {
    Status.OK: "yes",
    Status.UNPINNED: "-",
    Status.BODY: "body differs",
    Status.MOVED: "moved",
    Status.SIGNATURE: "parameters differ",
    Status.MISSING: "missing",
}


def _pinned(comparison: Comparison) -> str:
    """Return the word for the table's column; a target that moved is missing at its old place."""
    moved_away = comparison.breaks and comparison.status is Status.MOVED
    return _PINNED[Status.MISSING if moved_away else comparison.status]


def as_text(result: dict[str, Any], every: bool = False, wide: bool = False) -> str:
    """Lay the report out as tables that can be pasted into an issue; ``every`` hook, or those to look at."""
    verl, packages = result["verl"], result["packages"]
    told = {
        "verl-fl-overlay": f"{result['overlay']} in {result['overlay folder']}",
        "verl": _verl(verl),
        **{name: version for name, version in result["versions"].items() if name not in packages},
        **{name: pinned(about) for name, about in packages.items()},
        "device": result["device"],
        "settings": _settings(result["settings"]),
    }
    lines = [*terminal.table((), told.items(), wide=wide), ""]
    if result["components"]:
        tried = [
            (name, about["asked for by"], _yes(not about["fault"]), _found(about))
            for name, about in result["components"].items()
        ]
        lines += [*terminal.table(("tried", "asked for by", "can be used", "found"), tried, wide=wide), ""]
    if result["hooks"]:
        features = [
            (name, "yes" if about["on"] else "no", about["summary"] if about["on"] else about["reason"])
            for name, about in result["features"].items()
        ]
        lines += terminal.table(("feature", "on", "what for, or why not"), features, wide=wide)
        for name, feature in result["features"].items():
            lines += _detail(name, feature.get("detail", {}), wide)
    if result["hooks"]:
        lines += ["", *_hooks(result["hooks"], every, wide)]
    lines += [
        "",
        *terminal.problems(result["problems"], wide=wide),
        *terminal.listed("notes", result["notes"], wide=wide),
    ]
    return "\n".join(lines)


def _verl(verl: dict[str, Any]) -> str:
    said = f"{verl['version'] or 'not installed'}" + (f" (hooks of {verl['shim']})" if verl["shim"] else "")
    return said if verl["supported"] or not verl["version"] else terminal.Bad(f"{said}  NOT SUPPORTED")


def _yes(holds: bool) -> str:
    return terminal.Good("yes") if holds else terminal.Bad("no")


def _hooks(hooks: list[dict[str, Any]], every: bool, wide: bool) -> list[str]:
    """Return the table of ``every`` hook, or of those to look at, and how many there are."""
    shown = [hook for hook in hooks if every or _to_look_at(hook)]
    rows = [
        (
            hook["name"],
            "yes" if hook["required"] else "no",
            hook["pinned"],
            terminal.Bad(hook["state"]) if hook["state"] == State.FAILED.value else hook["state"],
            hook["target"] + (f"; {hook['detail']}" if hook["detail"] else ""),
        )
        for hook in shown
    ]
    states = Counter(hook["state"] for hook in hooks)
    counted = f"hooks: {', '.join(f'{count} {state}' for state, count in states.items())}"
    others = "" if every else f"; {'the others' if shown else 'all'} are as they should be: --all lists them"
    lines = terminal.table(("hook", "required", "pinned", "state", "target"), rows, wide=wide) if rows else []
    return [*lines, *terminal.sentences([counted + others], wide=wide)]


def _to_look_at(hook: dict[str, Any]) -> bool:
    """Return whether somebody has to look at a hook: it is on no target, or something is not as pinned."""
    if hook["state"] == State.DISABLED.value or hook["detail"].startswith(NOT_NEEDED):
        return False
    as_pinned = hook["outcome"] in ("", Outcome.WORKS.value)
    return not as_pinned or hook["state"] not in (State.INSTALLED.value, State.REMOVED.value)


def _found(told: dict[str, Any]) -> str:
    return _value({name: text for name, text in told.items() if text and name not in ("asked for by", "fault")})


def _detail(name: str, detail: dict[str, Any], wide: bool) -> list[str]:
    """Lay out a feature's description, one row per entry; empty entries are left out."""
    told = [(f"  {key}", _value(value)) for key, value in detail.items() if value not in (None, "", [], {}, ())]
    return ["", terminal.title(name), *terminal.table((), told, wide=wide)] if told else []


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _settings(settings: dict[str, Any]) -> str:
    """Show what differs from the defaults."""
    default = Settings()
    changed = {name: value for name, value in settings.items() if value != getattr(default, name)}
    return ", ".join(f"{name}={_value(value)}" for name, value in changed.items()) or "all as by default"


def quiet() -> None:
    """Keep third-party libraries from writing progress and advice between the lines of the report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
