"""``verl-fl tune``: measures, for one model's real training step, which operators are faster from FlagGems.

A step is recorded: every operator FlagGems offers, with the shapes it was called with.  Each is timed native and from
FlagGems at those shapes, the faster ones are routed together, and whole steps decide whether they stay.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from verl_fl_overlay.compat import trial
from verl_fl_overlay.flaggems import names, safety
from verl_fl_overlay.flaggems.calls import Call, Step, record
from verl_fl_overlay.flaggems.library import FlagGems, Kernel
from verl_fl_overlay.flaggems.library import load as load_flag_gems
from verl_fl_overlay.flaggems.profile import Key, Measurement, Profile, ProfileError, key_here, load
from verl_fl_overlay.flaggems.routing import Router
from verl_fl_overlay.flaggems.timing import call_ms, step_ms

LARGEST, MOST_FREQUENT = 3, 3
"""Of an operator's different calls, so many are timed: the device's time is in the former, the host's in the latter."""

ROUNDS = 5
"""Native and routed steps take so many turns; chance alone makes one side faster in all of them once in 32 times."""

Say = Callable[[str], None]


def measure(kernel: Kernel, calls: Counter[Call]) -> Measurement:
    """Time the kernel against torch's own at the shapes of ``calls``, both through torch's dispatcher."""
    reason = safety.why_unsafe(kernel)
    native, routed = 0.0, 0.0
    if not reason:
        try:
            native = _spent(kernel.key, calls)
            with _routed([kernel]) as router:
                holder = router.held.get(kernel.key)
                reason = router.failed.get(kernel.key) or (f"held by {holder}" if holder else "")
                routed = _spent(kernel.key, calls)
        except Exception as error:  # whatever a kernel raises at a shape it does not support
            reason = f"{type(error).__name__}: {str(error)[:80]}"
    if reason:
        native, routed = 0.0, 0.0
    return Measurement(kernel.key, kernel.name, calls.total(), native, routed, reason)


def _spent(key: str, calls: Counter[Call]) -> float:
    """Return what all ``calls`` of an operator take, milliseconds: one that is not timed, as much as the nearest."""
    name, _, overload = key.partition(".")
    operator = getattr(getattr(torch.ops.aten, name), overload or "default")
    timed: dict[Call, float] = {}
    for call in _representative(calls):
        args, kwargs = call.arguments()
        timed[call] = call_ms(lambda a=args, k=kwargs: operator(*a, **k))  # type: ignore[misc]

    def of(call: Call) -> float:
        return timed.get(call) or timed[min(timed, key=lambda one: abs(math.log(one.elements / call.elements)))]

    return sum(count * of(call) for call, count in calls.items())


def _representative(calls: Counter[Call]) -> Iterable[Call]:
    largest = sorted(calls, key=lambda call: -calls[call] * call.elements)[:LARGEST]
    frequent = (call for call, _ in calls.most_common(MOST_FREQUENT))
    return dict.fromkeys((*largest, *frequent))


@contextlib.contextmanager
def _routed(kernels: Iterable[Kernel]) -> Iterator[Router]:
    """Have ``kernels`` answer their operators, as training would have them."""
    router = Router([safety.seen_by_autograd(kernel) for kernel in kernels])
    router.enter()
    try:
        yield router
    finally:
        router.leave()


def tune(
    step: Step, gems: FlagGems, key: Key, workload: str, file: Path, *, skip: Collection[str] = (), say: Say = print
) -> Profile:
    """Measure and write ``file`` after every operator; a file of the same key and workload is gone on with.

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
    calls = record(step, gems.kernels)
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
    profile = _decide(profile, step, gems, say)
    profile.save(file)
    return profile


def tune_model(
    model: str, file: Path, *, rows: int, length: int, micro_batch: int, skip: Collection[str] = (), say: Say = print
) -> Profile:
    """Tune for a model's folder: ``rows`` sequences of at most ``length`` tokens a step, in verl's FSDP2 engine.

    Fused modules and log-probs are as the job will have them; no operator is routed while it is recorded.

    Raises:
        FlagGemsError: FlagGems cannot be used here.
        ProfileError: ``file`` is there and damaged or another's, or cannot be written.
        SettingsError: ``skip`` names what FlagGems does not have.
    """
    for variable in ("USE_FLAGGEMS", "TRAINING_FL_FLAGGEMS_ENABLE"):
        os.environ.pop(variable, None)
    gems = load_flag_gems()
    names.check(skip, "--skip", gems)
    step = trial.steps(model, rows, length, micro_batch)
    workload = f"{model}: {rows} sequences of up to {length} tokens, {micro_batch} at a time"
    return tune(step, gems, key_here(), workload, file, skip=skip, say=say)


def _begun(file: Path, key: Key, workload: str) -> Profile:
    """Return what is to be gone on with, written down: that it cannot be is better known now than after measuring."""
    profile = Profile(key, workload)
    if file.exists():
        profile = load(file)
        if (profile.key, profile.workload) != (key, workload):
            raise ProfileError(
                f"{file} holds another profile and is not overwritten; take another --out, or remove it.\n"
                f"  it holds: {profile.key}; {profile.workload}\n  this is:  {key}; {workload}"
            )
        measured = tuple(one for one in profile.measurements if not one.note)
        profile = replace(profile, measurements=measured, chosen=(), step_ms={})
    try:
        profile.save(file)
    except OSError as error:
        raise ProfileError(f"the profile {file} cannot be written: {error.strerror}") from error
    return profile


def _decide(profile: Profile, step: Step, gems: FlagGems, say: Say) -> Profile:
    """Route the functions all of whose keys are faster if whole steps get faster by it; if not, try the better half."""
    by_name: dict[str, list[Measurement]] = {}
    for one in profile.measurements:
        by_name.setdefault(one.name, []).append(one)
    saved = {name: sum(one.native_ms - one.flaggems_ms for one in ones) for name, ones in by_name.items()}
    tried = [name for name in sorted(saved, key=lambda n: -saved[n]) if all(one.faster for one in by_name[name])]
    native: list[float] = []
    while tried:
        native, routed = _in_turns(step, [k for k in gems.kernels if k.name in tried and not safety.why_unsafe(k)])
        times = {"native": statistics.median(native), "chosen": statistics.median(routed)}
        wins = sum(b < a for a, b in zip(native, routed, strict=True))
        found = f"native {times['native']:.1f}, routed {times['chosen']:.1f} ms, faster in {wins} of {ROUNDS} rounds"
        say(f"whole step with {', '.join(tried)}: {found}")
        if wins == ROUNDS:
            return replace(profile, chosen=tuple(sorted(tried)), step_ms=times)
        tried = tried[: len(tried) // 2]
    times = {"native": statistics.median(native) if native else step_ms(step)}
    say(f"nothing is routed; whole step: {times['native']:.1f} ms")
    return replace(profile, chosen=(), step_ms=times)


def _in_turns(step: Step, kernels: list[Kernel]) -> tuple[list[float], list[float]]:
    """Return the times of a step without and with ``kernels``, a pair a round, milliseconds."""
    native, routed = [], []
    for _ in range(ROUNDS):
        native.append(step_ms(step))
        with _routed(kernels):
            routed.append(step_ms(step))
    return native, routed
