"""Measures, for one training step, which operators are faster from FlagGems.

One step shows which of FlagGems' operators are called, and with which shapes.  Each operator is timed at those shapes,
native and from FlagGems.  From the faster ones, tune chooses those that make whole steps faster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from verl_fl_overlay.flaggems import safety
from verl_fl_overlay.flaggems.library import FlagGems, Kernel
from verl_fl_overlay.flaggems.profile import Key, Measurement, Profile, ProfileError, load
from verl_fl_overlay.flaggems.tuning.calls import Call, Step, calls_of, operator
from verl_fl_overlay.flaggems.tuning.contest import Contest, Say, routed
from verl_fl_overlay.flaggems.tuning.timing import call_ms

LARGEST, MOST_FREQUENT = 3, 3
"""How many calls of an operator are timed: the largest cost the device time, the most frequent cost the host time."""


def measure(kernel: Kernel, calls: Counter[Call]) -> Measurement:
    """Time the kernel against torch's own at the shapes of ``calls``, both through torch's dispatcher."""
    reason = safety.why_unsafe(kernel)
    if not reason:
        try:
            native = _spent(kernel.key, calls)
            with routed([kernel]):
                ours = _spent(kernel.key, calls)
            return Measurement(kernel.key, kernel.name, calls.total(), native, ours)
        except Exception as error:  # a kernel may raise anything at a shape it does not support
            reason = f"{type(error).__name__}: {str(error)[:80]}"
    return Measurement(kernel.key, kernel.name, calls.total(), 0.0, 0.0, reason)


def _spent(key: str, calls: Counter[Call]) -> float:
    """Return the time of all ``calls`` of an operator, milliseconds; one that is not timed counts as the nearest."""
    timed: dict[Call, float] = {}
    for call in _representative(calls):
        args, kwargs = call.arguments()
        timed[call] = call_ms(lambda a=args, k=kwargs: operator(key)(*a, **k))  # type: ignore[misc]

    def of(call: Call) -> float:
        return timed.get(call) or timed[min(timed, key=lambda one: abs(math.log(one.elements / call.elements)))]

    return sum(count * of(call) for call, count in calls.items())


def _representative(calls: Counter[Call]) -> Iterable[Call]:
    largest = sorted(calls, key=lambda call: -calls[call] * call.elements)[:LARGEST]
    frequent = (call for call, _ in calls.most_common(MOST_FREQUENT))
    return dict.fromkeys((*largest, *frequent))


def tune(
    step: Step, gems: FlagGems, key: Key, workload: str, file: Path, *, skip: Collection[str] = (), say: Say = print
) -> Profile:
    """Measure, and write ``file`` after every operator.  A file of the same key and workload is continued.

    Args:
        step: one training step; called with nothing, leaves nothing to wait for but the device.
        gems: the FlagGems of this process.
        key: what the profile will hold for.
        workload: the model and the batch, in words.
        file: where the profile goes.
        skip: functions that are not measured, such as matrix products whose autotuning takes minutes.
        say: told of the progress, a line at a time.
    """
    profile = _begun(file, key, workload)
    step()
    calls = calls_of(step, gems.kernels)
    kept = tuple(one for one in profile.measurements if _holds(one, calls))
    if len(kept) < sum(not one.note for one in profile.measurements):  # some are from another step, as the choice is
        profile = replace(profile, chosen=(), step_ms={})
    profile = replace(profile, measurements=kept)
    done = {one.key for one in profile.measurements}
    for number, (name, counted) in enumerate(sorted(calls.items(), key=lambda item: -item[1].total()), 1):
        kernel = next(kernel for kernel in gems.kernels if kernel.key == name)
        if name in done:
            continue
        if kernel.name in skip:
            one = Measurement(name, kernel.name, counted.total(), 0.0, 0.0, "not measured: skipped")
        else:
            one = measure(kernel, counted)
        profile = replace(profile, measurements=(*profile.measurements, one))
        profile.save(file)
        found = one.note or f"native {one.native_ms:.2f}, FlagGems {one.flaggems_ms:.2f} ms"
        say(f"{number}/{len(calls)} {name}: {found}")
    profile = _decided(profile, step, gems, say)
    profile.save(file)
    return profile


def _holds(one: Measurement, calls: Mapping[str, Counter[Call]]) -> bool:
    """Tell whether a measurement in the file is of this step.  A measurement without times is repeated."""
    return not one.note and one.key in calls and one.calls == calls[one.key].total()


def _begun(file: Path, key: Key, workload: str) -> Profile:
    """Return the profile to continue, and write it now: if the file cannot be written, that shows before measuring."""
    profile = Profile(key, workload)
    if file.exists():
        profile = load(file)
        if (profile.key, profile.workload) != (key, workload):
            raise ProfileError(
                f"{file} holds another profile and is not overwritten; take another --out, or remove it.\n"
                f"  it holds: {profile.key}; {profile.workload}\n  this is:  {key}; {workload}"
            )
    try:
        profile.save(file)
    except OSError as error:
        raise ProfileError(f"the profile {file} cannot be written: {error.strerror}") from error
    return profile


def _decided(profile: Profile, step: Step, gems: FlagGems, say: Say) -> Profile:
    """Take the functions with every key faster, try them in whole steps, and choose those that make steps faster."""
    by_name: dict[str, list[Measurement]] = {}
    for one in profile.measurements:
        by_name.setdefault(one.name, []).append(one)
    saved = {name: sum(one.native_ms - one.flaggems_ms for one in ones) for name, ones in by_name.items()}
    candidates = [name for name in sorted(saved, key=lambda n: -saved[n]) if all(one.faster for one in by_name[name])]
    contest = Contest(step, gems, say)
    chosen = contest.winners([], candidates)
    if chosen:
        native, ours = contest.times(chosen)
        if ours < native:
            return replace(profile, chosen=tuple(sorted(chosen)), step_ms={"native": native, "chosen": ours})
    say("nothing is routed: nothing made whole steps faster")
    return replace(profile, chosen=(), step_ms={"native": contest.step_ms([])})
