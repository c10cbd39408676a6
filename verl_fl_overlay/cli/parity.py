"""``verl-fl parity``: does a step with the overlay compute what verl computes without it, up to rounding?

Three processes run one step of verl's real engine on the same weights and batch: twice without the overlay, which shows
the noise, and once with the overlay and the environment as the job will have it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings

TRIAL = Path(compat.__file__).parent / "trial.py"
MODULES, PLUGINS = "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS"
NOISE = 3.0
"""A difference is also allowed if it is at most so many times that between two native runs."""


class TrialError(OverlayError):
    """A run of the engine failed; holds the end of what it printed."""


@dataclass(frozen=True)
class Line:
    """One compared quantity: overlay against native, native against native, and what is allowed."""

    name: str
    difference: float
    noise: float
    bound: float

    @property
    def of_allowed(self) -> float:
        """The difference as a part of what is allowed, the bound or the noise; infinite for NaN."""
        part = self.difference / max(self.bound, NOISE * self.noise)
        return float("inf") if math.isnan(part) else part

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound or the noise; NaN is not."""
        return self.of_allowed <= 1


@dataclass(frozen=True)
class Trial:
    """What is run: a model's folder, and a batch of ``rows`` sequences of at most ``length`` tokens."""

    model: str
    rows: int = 4
    length: int = 256
    micro_batch: int = 2
    seed: int = 0


def native_environment() -> dict[str, str]:
    """Return the environment without the overlay; where verl cannot do without it, with no more of it than that.

    That is on a CPU and on a chip that verl does not know.  Other modules that verl loads stay, so that what they do
    is on both sides; other plugins are off where none is named, since nothing else keeps the overlay's out.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VERL_FL_", "TRAINING_FL", "USE_FLAG")) and name not in ("RANK", "WORLD_SIZE")
    }
    others = {name: _without_overlay(kept.pop(name, "")) for name in (MODULES, PLUGINS)}
    settings, _ = Settings.parse()
    if chips.without_platform(settings) is None:
        plugins = others[PLUGINS] if others[PLUGINS] not in ("", "auto") else "none"
        return {**kept, MODULES: others[MODULES], PLUGINS: plugins}
    found = compat.find_verl()
    hooks = compat.select(found).hooks if found else ()
    return {
        **kept,
        MODULES: ",".join(filter(None, ("verl_fl_overlay", others[MODULES]))),
        "VERL_FL_DEVICE": settings.device,
        "VERL_FL_FUSED": "0",
        "VERL_FL_DISABLE": ",".join(hook.name for hook in hooks if hook.feature == "logprobs"),
    }


def overlay_environment() -> dict[str, str]:
    """Return this process's environment, with the overlay named in it."""
    return {**os.environ, MODULES: os.environ.get(MODULES, "verl_fl_overlay")}


def _without_overlay(names: str) -> str:
    return ",".join(name for name in names.split(",") if name.strip() != "verl_fl_overlay")


def run_trial(trial: Trial, environment: dict[str, str]) -> dict[str, Any]:
    """Run ``trial`` in a process of its own; return what ``compat/trial.py`` saved.

    Raises:
        TrialError: the process failed.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        numbers = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(trial).items() if name != "model"]
        # By path, and not with its folder first in the search path, in which "logprobs" is another module.
        program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", program, str(TRIAL), trial.model, str(result), *numbers],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not result.exists():
            raise TrialError(
                f"the engine failed, exit status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        loaded: dict[str, Any] = torch.load(result, weights_only=True)
        return loaded


def run_with_overlay(trial: Trial) -> dict[str, Any]:
    """Run ``trial`` in this process's environment.

    Raises:
        TrialError: it failed, or ran without the overlay.
    """
    result = run_trial(trial, overlay_environment())
    if not result["overlay"]:
        raise TrialError(f"the overlay was not loaded: {MODULES} has to name verl_fl_overlay")
    return result


def kernels_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the features that compute say of a trial with the overlay: which kernels they used, and why not."""
    told = result["overlay"]["features"]
    return {name: told[name].get("detail", {}) for name in ("logprobs", "fused", "flaggems") if told[name]["on"]}


def compare(native: dict[str, Any], again: dict[str, Any], ours: dict[str, Any]) -> list[Line]:
    """Return every compared quantity; ``again`` is a second native run.

    The bounds are those of a model that computes in bf16.  Where flash-attn is missing verl rounds a log-prob to bf16
    itself: by half a unit in the last place at most, by a quarter on average, and the overlay does not.  Twice that is
    allowed on average and four times at most, since a fused kernel rounds once where native modules round twice.
    Rounding alone makes a KL of a 24th of the squared unit; four times that is allowed, and 1e-3 in any case, which is
    far below where PPO's early stopping acts.  A gradient is a sum over all tokens, in which roundings cancel out: 2 %
    of its norm, 3 % of a group's (one parameter of every layer), are ten times what was seen.  A single parameter's may
    be little more than rounding, so half of it is allowed: a gradient that is cut is off by all of it.
    """

    def line(name: str, measure: Any, bound: float) -> Line:
        return Line(name, measure(ours, native), measure(again, native), bound)

    unit = _unit(native["log_probs"].double())
    rounding = 4 * float((unit**2).mean()) / 24
    lines = [
        line("log-prob, largest difference in bf16 units", lambda a, b: float((_gap(a, b).abs() / unit).max()), 2.0),
        line("log-prob, mean difference in bf16 units", lambda a, b: float((_gap(a, b).abs() / unit).mean()), 0.5),
        line("KL(native, overlay), estimated by k3", lambda a, b: float(_k3(_gap(a, b))), max(1e-3, rounding)),
        # A loss over few tokens is rounded to bf16 as they are: by up to a unit in the last place.
        line("loss, relative", lambda a, b: _relative(a["loss"], b["loss"]), 2**-8),
        line("grad_norm, relative", lambda a, b: _relative(a["grad_norm"], b["grad_norm"]), 0.02),
    ]
    for group in _by_group(native["grad_norms"]):

        def of_group(a: dict[str, Any], b: dict[str, Any], group: str = group) -> float:
            return _relative(_by_group(a["grad_norms"])[group], _by_group(b["grad_norms"])[group])

        lines.append(line(f"grad_norm of {group}, relative", of_group, 0.03))

    def of_parameter(a: dict[str, Any], b: dict[str, Any], name: str) -> float:
        return _relative(a["grad_norms"][name], b["grad_norms"][name])

    parameters = [
        line(f"grad_norm of one parameter at most ({name}), relative", partial(of_parameter, name=name), 0.5)
        for name in native["grad_norms"]
    ]
    return [*lines, *sorted(parameters, key=lambda one: one.of_allowed)[-1:]]


def _by_group(norms: dict[str, float]) -> dict[str, float]:
    """Return the norms of groups: the parameters whose names differ in numbers only."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        group = ".".join("*" if part.isdigit() else part for part in name.split("."))
        squares[group] = squares.get(group, 0.0) + norm**2
    return {group: square**0.5 for group, square in squares.items()}


def _gap(one: dict[str, Any], other: dict[str, Any]) -> Any:
    return one["log_probs"].double() - other["log_probs"].double()


def _unit(values: Any) -> Any:
    """Return a unit in the last place of bf16 at ``values``; near zero that at one, which logits have there."""
    return 2.0 ** (values.abs().clamp(min=1).log2().floor() - 7)


def _k3(gap: Any) -> Any:
    """Estimate KL from the log-prob ratios of given tokens: the mean of exp(gap) - 1 - gap, never negative."""
    return (gap.exp() - 1 - gap).mean()


def _relative(one: float, other: float) -> float:
    return abs(one - other) / abs(other) if other else abs(one)


def examine(trial: Trial) -> dict[str, Any]:
    """Run all three and compare; return the lines, the verdict and which kernels the overlay used."""
    native = run_trial(trial, native_environment())
    again = run_trial(trial, native_environment())
    ours = run_with_overlay(trial)
    lines = compare(native, again, ours)
    return {
        **asdict(trial),
        "tokens": native["tokens"],
        "verl": ours["overlay"]["verl"]["version"],
        "device": ours["overlay"]["device"],
        "overlay": kernels_of(ours),
        "lines": [{**asdict(line), "holds": line.holds} for line in lines],
        "same": all(line.holds for line in lines),
    }


def as_text(result: dict[str, Any]) -> str:
    """Return the result of ``examine`` as a table with a verdict."""
    width = max(len(line["name"]) for line in result["lines"])
    rows = [
        f"{result['model']}: {result['tokens']} tokens, verl {result['verl']}, {result['device']}",
        f"{'':{width}} {'overlay':>10} {'noise':>10} {'allowed':>10}",
    ]
    for line in result["lines"]:
        mark = "" if line["holds"] else "  TOO LARGE"
        rows.append(
            f"{line['name']:{width}} {line['difference']:10.3g} {line['noise']:10.3g} {line['bound']:10.3g}{mark}"
        )
    rows.append(
        "same: every difference is within its bound (or three times the noise of two native runs)"
        if result["same"]
        else "NOT the same: VERL_FL_DISABLE=logprobs.fsdp or VERL_FL_FUSED=0 tell which part it is"
    )
    return "\n".join(rows)
