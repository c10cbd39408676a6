"""``verl-fl tune``: measures, for one model's real training step, which operators are faster from FlagGems.

A step is recorded: every operator FlagGems offers, with the shapes it was called with.  Each is timed native and from
FlagGems at those shapes, the faster ones are routed together, and whole steps decide whether they stay.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from verl_fl_overlay.compat import trial
from verl_fl_overlay.flaggems import safety
from verl_fl_overlay.flaggems.library import FlagGems, Kernel
from verl_fl_overlay.flaggems.library import load as load_flag_gems
from verl_fl_overlay.flaggems.profile import Key, Measurement, Profile, ProfileError, key_here, load
from verl_fl_overlay.flaggems.routing import Router

SHAPES = 3
"""Of an operator's different calls, so many are timed: those with the most elements in total."""

Step = Callable[[], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """A tensor's description, from which a like one is made."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def make(self) -> torch.Tensor:
        """Return a tensor of this shape: small random numbers, zeros for indices and masks."""
        expanded = tuple(1 if stride == 0 else size for size, stride in zip(self.size, self.stride, strict=True))
        tensor = torch.empty_strided(expanded, self.stride, dtype=self.dtype, device=self.device)
        tensor = tensor.normal_().mul_(0.1) if self.dtype.is_floating_point else tensor.zero_()
        return tensor.expand(self.size)


Call = tuple[tuple[Any, ...], Any]
"""The flattened arguments, tensors as ``Shape``, and how they were nested."""


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Counts the calls of some operators, with their arguments."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        super().__init__()
        self._on_cpu = {kernel.key: "CPU" in kernel.dispatch_keys for kernel in kernels}
        self.calls: dict[str, Counter[Call]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # DTensor and the like take themselves apart; their parts come back here
        key = func._schema.name.removeprefix("aten::")
        key += f".{func._overloadname}" if func._overloadname != "default" else ""
        leaves, tree = tree_flatten((args, kwargs))
        if key in self._on_cpu and (self._on_cpu[key] or "cpu" not in _devices(leaves)):
            call = (tuple(_described(leaf) for leaf in leaves), tree)
            with contextlib.suppress(TypeError):  # an argument that cannot be a key, such as a generator
                self.calls.setdefault(key, Counter())[call] += 1
        return func(*args, **kwargs)


def _devices(leaves: Iterable[Any]) -> set[str]:
    found = (leaf.device if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return {device.type for device in found if isinstance(device, torch.device)}


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return Shape(tuple(value.shape), tuple(value.stride()), value.dtype, str(value.device))


def record(step: Step, gems: FlagGems) -> dict[str, Counter[Call]]:
    """Return, for each aten key that FlagGems has, the calls of one step."""
    recorder = Recorder(gems.kernels)
    with recorder:
        step()
    return recorder.calls


def measure(kernel: Kernel, calls: Counter[Call]) -> Measurement:
    """Time the kernel against torch's own at the shapes of ``calls``."""
    reason = safety.why_unsafe(kernel)
    total = calls.total()
    if reason:
        return Measurement(kernel.key, kernel.name, total, 0.0, 0.0, reason)
    name, _, overload = kernel.key.partition(".")
    native = getattr(getattr(torch.ops.aten, name), overload or "default")
    largest = sorted(calls, key=lambda call: -calls[call] * _elements(call))[:SHAPES]
    covered = sum(calls[call] for call in largest)
    times = [0.0, 0.0]
    try:
        for call in largest:
            args, kwargs = tree_unflatten(
                [leaf.make() if isinstance(leaf, Shape) else leaf for leaf in call[0]], call[1]
            )
            for side, function in enumerate((native, kernel.function)):
                times[side] += calls[call] * milliseconds(lambda f=function, a=args, k=kwargs: f(*a, **k))  # type: ignore[misc]
    except Exception as error:  # whatever a kernel raises at a shape it does not support
        return Measurement(kernel.key, kernel.name, total, 0.0, 0.0, f"{type(error).__name__}: {str(error)[:80]}")
    rest = total / covered
    return Measurement(kernel.key, kernel.name, total, times[0] * rest, times[1] * rest)


def _elements(call: Call) -> int:
    return sum(math.prod(leaf.size) for leaf in call[0] if isinstance(leaf, Shape)) + 1


def milliseconds(run: Callable[[], Any], repeats: int = 9) -> float:
    """Return the median time of ``run``: of the device, or of the host if that is longer."""
    device = torch.cuda.is_available()
    times = []
    for number in range(repeats + 2):
        begun = time.perf_counter()
        if device:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        run()
        host = 1000 * (time.perf_counter() - begun)
        if device:
            end.record()
            end.synchronize()
            host = max(host, start.elapsed_time(end))
        if number >= 2:
            times.append(host)
    return statistics.median(times)


def whole_step(step: Step, repeats: int = 7) -> float:
    """Return the median time of a step, milliseconds, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[2:])


def tune(
    step: Step, gems: FlagGems, key: Key, workload: str, file: Path, *, skip: Iterable[str] = (), say: Say = print
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
    calls = record(step, gems)
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
    model: str, file: Path, *, rows: int, length: int, micro_batch: int, skip: Iterable[str] = (), say: Say = print
) -> Profile:
    """Tune for a model's folder: ``rows`` sequences of at most ``length`` tokens a step, in verl's FSDP2 engine.

    Fused modules and log-probs are as the job will have them; no operator is routed while it is recorded.

    Raises:
        FlagGemsError: FlagGems cannot be used here.
        ProfileError: ``file`` is there and damaged or another's, or cannot be written.
    """
    for name in ("USE_FLAGGEMS", "TRAINING_FL_FLAGGEMS_ENABLE"):
        os.environ.pop(name, None)
    gems = load_flag_gems()
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
    """Route the functions all of whose keys are faster; keep them if whole steps get faster by it."""
    by_name: dict[str, list[Measurement]] = {}
    for one in profile.measurements:
        by_name.setdefault(one.name, []).append(one)
    wins = tuple(sorted(name for name, ones in by_name.items() if all(one.faster for one in ones)))
    times = {"native": whole_step(step)}
    if wins:
        router = Router(
            [safety.seen_by_autograd(k) for k in gems.kernels if k.name in wins and not safety.why_unsafe(k)]
        )
        router.enter()
        try:
            times["chosen"] = whole_step(step)
        finally:
            router.leave()
    kept = wins if times.get("chosen", times["native"]) < times["native"] else ()
    say(f"whole step: {times}; routed: {', '.join(kept) or 'nothing'}")
    return replace(profile, chosen=kept, step_ms=times)
