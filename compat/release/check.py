"""Checks whether the hooks work on a verl, tested or not: compares its source with the pins, and does not import it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from packaging.version import Version

from verl_fl_overlay import compat, features
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import MISSING, Fingerprint
from verl_fl_overlay.compat.release import pinning
from verl_fl_overlay.compat.release.fingerprint import elsewhere, fingerprint
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.compat.trial import RELIES_ON
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.settings import Settings


class Status(str, Enum):
    """What became of a pinned definition, from the most harmless to the worst."""

    OK = "OK"
    UNPINNED = "UNPINNED"
    """Outside verl, or new in the hooks: there is nothing to compare it with."""
    BODY = "BODY changed"
    MOVED = "MOVED"
    SIGNATURE = "SIGNATURE"
    MISSING = "MISSING"


class Outcome(str, Enum):
    """What the check means for a hook; the verdict, the exit status and all texts on the hook follow from it."""

    WORKS = "works"
    REVIEW = "review"
    """It works, but verl's code around it changed."""
    WITHOUT = "without"
    """The overlay loads without the hook, or without something that the hook reads."""
    REFUSED = "refused"
    """The overlay refuses to load, since the hook is required."""


@dataclass(frozen=True)
class Comparison:
    """One target, compared with its pin in the release ``against``; ``breaks`` if it cannot be used as pinned.

    ``late`` is set for an attribute that only instances have: the hook is installed even if the attribute is absent.
    """

    target: str
    status: Status
    against: str = ""
    detail: str = ""
    breaks: bool = False
    late: bool = False
    diff: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether somebody has to review it."""
        return self.status not in (Status.OK, Status.UNPINNED)


@dataclass(frozen=True)
class Finding:
    """What the check found for a hook: its target, what it relies on, the outcome, and the outcome in words."""

    hook: Hook
    target: Comparison
    reliances: tuple[Comparison, ...]
    outcome: Outcome
    meaning: str

    @property
    def fatal(self) -> bool:
        """Whether the overlay refuses to load because of this hook."""
        return self.outcome is Outcome.REFUSED

    @property
    def breaks(self) -> bool:
        """Whether the target, or something that the hook relies on, cannot be used as pinned."""
        return any(c.breaks for c in (self.target, *self.reliances))

    @property
    def changed(self) -> list[Comparison]:
        """The comparisons that somebody has to review."""
        return [c for c in (self.target, *self.reliances) if c.changed]


TRIAL = "parity, tune and warmup"
"""The commands that run the step of ``compat/trial.py``.  Training does not need it, so it is never fatal."""


@dataclass(frozen=True)
class Report:
    """The findings on one verl, one for each hook, and the comparisons of everything that the trial step uses."""

    version: str
    origin: str
    shim: str
    findings: tuple[Finding, ...] = ()
    trial: tuple[Comparison, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the overlay loads on this verl."""
        return not any(finding.fatal for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: works; works with less; works, review these; or will refuse to load."""
        if not self.holds:
            fatal = [f.hook.name + _only_with(f.hook) for f in self.findings if f.fatal]
            return f"verl-fl-overlay will refuse to load on verl {self.version}: {', '.join(fatal)}"
        less, review = (
            ", ".join(finding.hook.name for finding in self.findings if finding.outcome is outcome)
            for outcome in (Outcome.WITHOUT, Outcome.REVIEW)
        )
        said = f"verl {self.version} works" + (f" with less: {less}" if less else "")
        said += f"{';' if less else ','} review these: {review}" if review else ""
        return said + (f"; {TRIAL} cannot run on it" if self.trial_breaks else "")

    @property
    def trial_breaks(self) -> bool:
        """Whether the trial step cannot run."""
        return any(comparison.breaks for comparison in self.trial)


SourceOf = Callable[[str], Tree | None]
"""Returns the source of a pinned release, to show what changed since; None if the source is not available."""


def check(tree: Tree, against: str | None = None, source_of: SourceOf = lambda release: None) -> Report:
    """Compare what the hooks need with what is in ``tree``.

    ``against`` names the pinned release to compare with.  By default each target is compared with the newest release
    that is not newer than ``tree``, else with the oldest.  ``source_of`` is called only where something changed.

    Raises:
        OverlayError: verl is too old, a hooked file cannot be parsed, or ``against`` has no pins.
    """
    if against is not None and against not in compat.RELEASES:
        raise OverlayError(f"verl {against} is not pinned; pinned are {', '.join(compat.RELEASES)}")
    shim = pinning.shim_for(tree)
    releases = [against] if against else _nearest_first(tree.version)

    def compare(target: str, part: str = pins.HOOKS) -> Comparison:
        return _compare(tree, target, pins.pinned(target, part), releases, source_of)

    compared = {target: compare(target) for target in pinning.targets(shim.hooks)}

    def of(*targets: str) -> tuple[Comparison, ...]:
        return tuple(compared.get(target, Comparison(target, Status.UNPINNED)) for target in targets)

    cannot = {h.name for h in shim.hooks if any(c.breaks and not c.late for c in of(h.target, *h.relies_on))}
    findings = []
    for hook in shim.hooks:
        failed = hook if hook.name in cannot else _taken_back_with(hook, [h for h in shim.hooks if h.name in cannot])
        target, *reliances = of(hook.target, *hook.relies_on)
        outcome = _outcome(hook, shim, failed, [target, *reliances])
        meaning = _meaning(hook, outcome, shim, failed, [c.target for c in reliances if c.breaks])
        findings.append(Finding(hook, target, tuple(reliances), outcome, meaning))
    trial = tuple(compare(target, pins.TRIAL) for target in RELIES_ON)
    return Report(tree.version, tree.origin, shim.name, tuple(findings), trial)


def _taken_back_with(hook: Hook, cannot: list[Hook]) -> Hook | None:
    """Return the optional hook in ``cannot`` of the same feature and module; it prevents ``hook`` too."""
    group = (hook.feature, hook.module, False)
    return next((h for h in cannot if (h.feature, h.module, h.required) == group), None)


def _outcome(hook: Hook, shim: compat.Shim, failed: Hook | None, comparisons: list[Comparison]) -> Outcome:
    """Return the outcome; ``failed`` is a hook that cannot be installed: this one, or one that prevents this one."""
    if hook.name in shim.left_out:
        return Outcome.WITHOUT
    if failed and hook.required:
        return Outcome.REFUSED
    if failed or any(c.breaks for c in comparisons):
        return Outcome.WITHOUT
    return Outcome.REVIEW if any(c.changed for c in comparisons) else Outcome.WORKS


def _nearest_first(version: str) -> list[str]:
    base = Version(Version(version).base_version)
    older = [release for release in compat.RELEASES if Version(release) <= base]
    return [*reversed(older), *compat.RELEASES[len(older) :]]


def _compare(
    tree: Tree, target: str, by_release: dict[str, Fingerprint], releases: list[str], source_of: SourceOf
) -> Comparison:
    against = next((release for release in releases if release in by_release), "")
    if not against:
        return Comparison(target, Status.UNPINNED)
    pin, found = by_release[against], fingerprint(tree, *target.split(":"))
    late = pins.is_late(by_release)
    if found == MISSING:
        if places := elsewhere(tree, pin):
            return Comparison(target, Status.MOVED, against, f"{pin.at} -> {' or '.join(places)}", True, late)
        module = target.partition(":")[0]
        gone = "" if pinning.verl_in(tree).has_module(module) else f"the module {module} is gone"
        return Comparison(target, Status.MISSING, against, gone, True, late)
    if found.kind == "import" != pin.kind:
        detail = f"{pin.at} -> {found.at}, outside verl; its parameters are compared only when the hook is installed"
        return Comparison(target, Status.MOVED, against, detail)
    if found == pin:
        return Comparison(target, Status.OK, against)
    diff = _diff(target, found, against, tree, source_of)
    if not found.same_contract(pin):
        known = [release for release, other in by_release.items() if found.same_contract(other)]
        change = f"{pins.signature(pin)} -> {pins.signature(found)}"
        accepted = f", which is that of verl {known[0]}" if known else ""
        breaks = not known and pins.has_contract(by_release)
        return Comparison(target, Status.SIGNATURE, against, change + accepted, breaks, late, diff)
    if found.at != pin.at and found.body == pin.body:
        return Comparison(target, Status.MOVED, against, f"{pin.at} -> {found.at}; the old name still leads there")
    if found.at != pin.at:
        went_to = " or ".join(elsewhere(tree, pin)) or "nowhere"
        detail = f"{pin.at} -> {went_to}; the old name now leads to {found.at}, another function"
        return Comparison(target, Status.MOVED, against, detail, diff=diff)
    return Comparison(target, Status.BODY, against, _what_of_it(pin, found), diff=diff)


def _what_of_it(pin: Fingerprint, found: Fingerprint) -> str:
    if found.decorators != pin.decorators:
        return f"decorated by {', '.join(found.decorators) or 'nothing'}, which may change how it is called"
    return "" if found.parameters == pin.parameters else f"{pins.signature(pin)} -> {pins.signature(found)}"


def _diff(target: str, found: Fingerprint, against: str, tree: Tree, source_of: SourceOf) -> tuple[str, ...]:
    earlier = source_of(against)
    if earlier is None:
        return (f"(no diff: the source of verl {against} is not to be had here)",)
    old = fingerprint(earlier, *target.split(":"))
    names = (f"verl {against}  {old.at}", f"verl {tree.version}  {found.at}")
    return tuple(difflib.unified_diff(old.source, found.source, *names, lineterm="", n=2))


def _meaning(hook: Hook, outcome: Outcome, shim: compat.Shim, failed: Hook | None, lacks: list[str]) -> str:
    feature = features.FEATURES.get(hook.feature)
    if outcome is Outcome.REFUSED:
        summary = f" ({feature.summary})" if feature else ""
        unasked = feature.reason_off(Settings()) if feature else ""
        when = f"when {'verl' if hook.name in shim.absent else hook.module} is imported"
        unless = f", unless {unasked}" if unasked else ""
        return f"{hook.feature}{summary}: verl-fl-overlay refuses to load {when}{unless}{_only_with(hook)}"
    if outcome is not Outcome.WITHOUT:
        return ""
    if hook.name in shim.left_out:
        return f"{hook.feature} goes on without it, which is warned about where {hook.needs} is installed: {hook.why}"
    if failed is None:
        return (
            f"{hook.feature} goes on with less: the hook is installed, and does not find {', '.join(lacks)} as it was"
        )
    taken = "" if failed is hook else f" ({failed.name} cannot be installed, and they go together)"
    return f"{hook.feature} goes on without it{taken}: {hook.why}"


def _only_with(hook: Hook) -> str:
    return f" (only where {hook.needs} is installed)" if hook.needs else ""


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON types; its keys are stable."""
    return {
        "verl": report.version,
        "source": report.origin,
        "shim": report.shim,
        "verdict": report.verdict,
        "holds": report.holds,
        "hooks": [
            {
                "name": finding.hook.name,
                "feature": finding.hook.feature,
                "required": finding.hook.required,
                "outcome": finding.outcome.value,
                "fatal": finding.fatal,
                "meaning": finding.meaning,
                **_comparison(finding.target),
                "relies_on": [_comparison(reliance) for reliance in finding.reliances],
            }
            for finding in report.findings
        ],
        "trial": [_comparison(comparison) for comparison in report.trial],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {**vars(comparison), "status": comparison.status.value, "diff": list(comparison.diff)}


def as_text(report: Report) -> str:
    """Lay the report out: a line for each hook, under it what changed and what that means, the verdict last."""
    width = max(len(name) for name in (TRIAL, *(f.hook.name for f in report.findings)))
    lines = [f"verl {report.version} from {report.origin}, hooks of {report.shim}", ""]
    for finding in report.findings:
        lines.append(f"{finding.hook.name:{width}}  {_summary(finding)}")
        for comparison in finding.changed:
            lines += _change(comparison, "" if comparison is finding.target else f"relies on {comparison.target}: ")
        lines += [f"    means: {finding.meaning}"] if finding.meaning else []
    lines.append(f"{TRIAL:{width}}  {_worst(report.trial).status.value}")
    for comparison in report.trial:
        lines += _change(comparison, f"use {comparison.target}: ") if comparison.changed else []
    lines += [f"    means: {TRIAL} cannot run on this verl; training does not need it"] if report.trial_breaks else []
    return "\n".join([*lines, "", report.verdict])


def _change(comparison: Comparison, of_what: str) -> list[str]:
    detail = f" {comparison.detail}" if comparison.detail else ""
    first = f"    {of_what}{comparison.status.value}{detail} (against verl {comparison.against})"
    return [first, *(f"      {line}" for line in comparison.diff)]


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda comparison: list(Status).index(comparison.status))


def _summary(finding: Finding) -> str:
    if finding.target.status is Status.UNPINNED:
        return "not compared: outside verl" if not finding.hook.module.startswith("verl.") else "not pinned"
    worst = _worst((finding.target, *finding.reliances))
    return worst.status.value if worst is finding.target else f"{finding.target.status.value}, but see below"
