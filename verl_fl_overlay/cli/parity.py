"""``parity``: does a step with the overlay compute what verl computes without it, up to rounding?

Four processes run one step of verl's real engine on the same weights and batch: twice without the overlay, which shows
the noise; once with the overlay and the environment as the job will have it; and once in fp32 by eager attention, one
sequence at a time, which is as near as one gets to the right numbers. The job packs its sequences and takes
flash_attention_2, as verl does when nothing is said. Without flash-attn, verl alone cannot do that; then it runs
padded, with eager attention too: SDPA has no soft cap and no sinks.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from verl_fl_overlay.cli import model_folder, te_fl, terminal
from verl_fl_overlay.cli.trial import has_accelerator, kernels_of, native_environment, run_trial, run_with_overlay
from verl_fl_overlay.compat.trial import Trial
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.packages import flash_attn_imports
from verl_fl_overlay.settings import Settings

NOISE = 3.0
"""A difference is also allowed up to this multiple of the difference between two native runs."""

EXACT = "eager"
"""The attention of every model's own, written out."""

AS_NATIVE = 1.5
"""A distance from fp32 is also allowed up to this multiple of the native run's."""


def add(parity: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = (
        "Four processes run one step of verl's real engine: twice without the overlay, once in fp32, once with the "
        "overlay in this environment. Log-probs, entropy, loss and gradients are compared, with what rounding allows."
    )
    examples = (
        "verl-fl parity MODEL",
        "verl-fl parity MODEL --rows 8 --length 2048 --json > parity.json",
        "verl-fl parity MODEL --attention sdpa --padding",
        "verl-fl parity --te-fl",
    )
    exits = {0: "the same up to rounding", 1: "a difference is too large"}
    terminal.explain(parity, more, examples=examples, exits=exits)
    model = "a model's folder, Hugging Face format; not needed with --te-fl"
    parity.add_argument("model", nargs="?", metavar="MODEL", help=model)
    te_fl_help = "compare TransformerEngine-FL's implementations with fp32 instead; FlagGems tunes first, for minutes"
    parity.add_argument("--te-fl", action="store_true", help=te_fl_help)
    model_folder.add_batch(parity, rows=4, length=256, micro_batch=2)
    attention = "attn_implementation of the job: flash_attention_2, sdpa, eager, ... (default: %(default)s)"
    parity.add_argument("--attention", default=Trial.attention, metavar="NAME", help=attention)
    padding = "the job has use_remove_padding=False (default: its sequences are packed)"
    parity.add_argument("--padding", action="store_true", help=padding)
    seed = "of the random tokens, a whole number (default: %(default)s)"
    parity.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    form = parity.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    terminal.add_wide(form)
    parity.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the comparison; return 1 if a difference is too large.

    Raises:
        OverlayError: no model was given or it cannot be used, or TransformerEngine-FL is asked for and cannot be used.
    """
    if options.te_fl:
        if options.model:
            raise OverlayError("--te-fl compares operators without a model: leave the model out, or --te-fl")
        rows = te_fl.examine()
        print(as_json(rows) if options.json else te_fl.as_text(rows, options.wide))
        return 0 if te_fl.usable(rows) else 1
    if not options.model:
        raise OverlayError("the folder of a model is missing: verl-fl parity MODEL")
    shape = options.rows, options.length, options.micro_batch, options.seed
    trial = model_folder.checked(Trial(options.model, *shape, options.attention, options.padding))
    settings = Settings.from_environment()
    if settings.device != "cpu" and not has_accelerator(settings):
        raise OverlayError("torch sees no accelerator here; to compare on the CPU, export VERL_FL_DEVICE=cpu")
    result = examine(trial)
    print(as_json(result) if options.json else as_text(result, options.wide))
    return 0 if result["same"] else 1


@dataclass(frozen=True)
class Line:
    """One compared quantity: overlay against native, native against native, and what is allowed.

    Where the first is a distance from fp32, the second is the native run's.
    """

    name: str
    difference: float
    noise: float
    bound: float
    factor: float = NOISE

    @property
    def of_allowed(self) -> float:
        """The difference divided by the largest allowed one, the bound or a multiple of the noise; infinite for NaN."""
        part = self.difference / max(self.bound, self.factor * self.noise)
        return float("inf") if math.isnan(part) else part

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.of_allowed <= 1


def compare(
    native: dict[str, Any], again: dict[str, Any], ours: dict[str, Any], exact: dict[str, Any], *, alike: bool = True
) -> list[Line]:
    """Return every compared quantity.

    ``again`` is a second native run, ``exact`` the one in fp32.  Log-probs are compared with the native run's only if
    both runs are ``alike``, packed or padded, with the same attention: other sums give other roundings.

    The bounds are for a model that computes in bf16.  Without flash-attn verl rounds a log-prob to bf16, the overlay
    does not: that is at most half a unit in the last place, a quarter on average.  The bounds are 2 units at most and
    0.5 on average, since a fused kernel rounds once where native modules round twice.  Rounding alone gives a KL of
    unit**2 / 24.  Four times that is allowed, and 1e-3 in any case: PPO's early stopping acts far above it.  From fp32
    a run may also be half as far again as the native run.  In a gradient, which is a sum over all tokens, roundings
    cancel out.  So 2 % of its norm, or 3 % of a group's (one parameter of every layer), is allowed: ten times what was
    seen.  The gradient of a single parameter may be mostly rounding, so 50 % is allowed; a gradient that is cut differs
    by 100 %.
    """
    unit = _unit(exact["log_probs"].double())
    rounding = max(1e-3, 4 * float((unit**2).mean()) / 24)

    def line(name: str, measure: Any, bound: float) -> Line:
        return Line(name, measure(ours, native), measure(again, native), bound)

    def from_fp32(name: str, measure: Any, bound: float) -> Line:
        return Line(name, measure(ours, exact), measure(native, exact), bound, AS_NATIVE)

    def largest(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float((_gap(a, b).abs() / unit).max())

    def mean(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float((_gap(a, b).abs() / unit).mean())

    def divergence(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(_k3(_gap(a, b)))

    lines = [
        from_fp32("log-prob, largest distance from fp32 in bf16 units", largest, 2.0),
        from_fp32("log-prob, mean distance from fp32 in bf16 units", mean, 0.5),
        from_fp32("KL(fp32, overlay), estimated by k3", divergence, rounding),
        from_fp32("entropy, mean distance from fp32, relative", _entropy, 2**-8),
        # verl's own loss may be a sum in bf16: of few tokens it is further from fp32 than one bf16 unit.
        from_fp32("loss, distance from fp32, relative", lambda a, b: _relative(a["loss"], b["loss"]), 2**-8),
    ]
    if alike:
        lines += [
            line("log-prob, largest difference in bf16 units", largest, 2.0),
            line("log-prob, mean difference in bf16 units", mean, 0.5),
            line("KL(native, overlay), estimated by k3", divergence, rounding),
        ]
    lines += [
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
    """Return one norm per group; parameters are in one group if their names differ only in numbers."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        group = ".".join("*" if part.isdigit() else part for part in name.split("."))
        squares[group] = squares.get(group, 0.0) + norm**2
    return {group: square**0.5 for group, square in squares.items()}


def _gap(one: dict[str, Any], other: dict[str, Any]) -> Any:
    return one["log_probs"].double() - other["log_probs"].double()


def _entropy(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return how far the entropies are apart on average, relative to their size."""
    size = float(other["entropy"].double().abs().mean())
    apart = float((one["entropy"].double() - other["entropy"].double()).abs().mean())
    return apart / size if size else apart


def _unit(values: Any) -> Any:
    """Return bf16's unit in the last place at ``values``; for values below one, that at one, as logits have it."""
    return 2.0 ** (values.abs().clamp(min=1).log2().floor() - 7)


def _k3(gap: Any) -> Any:
    """Estimate KL from the log-prob ratios of given tokens: the mean of exp(gap) - 1 - gap, never negative."""
    return (gap.exp() - 1 - gap).mean()


def _relative(one: float, other: float) -> float:
    return abs(one - other) / abs(other) if other else abs(one)


def as_verl_can(trial: Trial) -> Trial:
    """Return what verl runs without the overlay: the same, or padded and eager where it has no flash-attn."""
    if trial.attention != Trial.attention or flash_attn_imports():
        return trial
    return replace(trial, attention=EXACT, padding=True)


def examine(trial: Trial) -> dict[str, Any]:
    """Run all four and compare; return the lines, the verdict and which kernels the overlay used."""
    without = as_verl_can(trial)
    with terminal.step("1/4 without the overlay"):
        native = run_trial(without, native_environment())
    with terminal.step("2/4 without the overlay again, for the noise"):
        again = run_trial(without, native_environment())
    with terminal.step("3/4 in fp32, one sequence at a time"):
        in_fp32 = replace(trial, attention=EXACT, padding=True, micro_batch=1, fp32=True)
        exact = run_trial(in_fp32, native_environment())
    with terminal.step("4/4 with the overlay"):
        ours = run_with_overlay(trial)
    lines = compare(native, again, ours, exact, alike=without == trial)
    return {
        **asdict(trial),
        "native": {"attention": without.attention, "padding": without.padding},
        "tokens": native["tokens"],
        "verl": ours["overlay"]["verl"]["version"],
        "device": ours["overlay"]["device"],
        "overlay": kernels_of(ours),
        "lines": [{**asdict(line), "holds": line.holds} for line in lines],
        "same": all(line.holds for line in lines),
    }


def as_json(result: Any) -> str:
    """Return JSON, in which a number that is infinite or none is null: JSON has neither."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, allow_nan=False)


def as_text(result: dict[str, Any], wide: bool = False) -> str:
    """Return the result of ``examine`` as a table with a verdict."""
    rows = [
        (
            f"{line['difference']:.3g}",
            f"{line['noise']:.3g}",
            f"{max(line['bound'], line['factor'] * line['noise']):.3g}",
            terminal.Good("ok") if line["holds"] else terminal.Bad("TOO LARGE"),
            line["name"],
        )
        for line in result["lines"]
    ]
    verdict = (
        terminal.Good(
            "same: every difference is within its bound, or near that of two native runs or of a native run from fp32"
        )
        if result["same"]
        else terminal.Bad(
            "NOT the same: --attention sdpa --padding, VERL_FL_DISABLE=logprobs.fsdp,entropy.fsdp or VERL_FL_FUSED=0 "
            "tell which part it is"
        )
    )
    heading = [
        f"{result['model']}: {result['tokens']} tokens, verl {result['verl']}, {result['device']}",
        f"the job: {_how(result)}; without the overlay: {_how(result['native'])}",
    ]
    lines = terminal.table(("overlay", "native", "allowed", "", "difference in"), rows, wide=wide)
    return "\n".join(
        [*terminal.sentences(heading, wide=wide), "", *lines, "", *terminal.sentences([verdict], wide=wide)]
    )


def _how(run: dict[str, Any]) -> str:
    return f"{'padded' if run['padding'] else 'packed'}, {run['attention']}"
