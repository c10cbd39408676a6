"""Checks whether the hooks work on a verl, tested or not: compares its source with the pins, and does not import it.

With a verl, the other pinned packages that are installed here are compared too; or one of them is checked by itself.
"""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from packaging.version import InvalidVersion, Version

from verl_fl_overlay import compat, features
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import MISSING, PACKAGES, VERL, Fingerprint, Package, top_level
from verl_fl_overlay.compat.release import pinning, sources
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
    """Not pinned, or its package is not here: there is nothing to compare; ``detail`` says which."""
    BODY = "BODY changed"
    MOVED = "MOVED"
    SIGNATURE = "SIGNATURE"
    MISSING = "MISSING"


class Outcome(str, Enum):
    """What the check means for a hook; the verdict, the exit status and all texts on the hook follow from it."""

    WORKS = "works"
    REVIEW = "review"
    """It works, but the code around it changed."""
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

    @property
    def package(self) -> str:
        """The distribution that ``against`` is a release of."""
        return PACKAGES[top_level(self.target)].distribution


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
    """The findings on one release, one for each hook, and the comparisons of everything that the trial step uses.

    ``others`` are the pinned packages beside verl, and the version of each that was compared, None if it is not here.
    """

    package: Package
    version: str
    origin: str
    shim: str
    findings: tuple[Finding, ...] = ()
    trial: tuple[Comparison, ...] = ()
    others: Mapping[Package, str | None] = field(default_factory=dict)

    @property
    def release(self) -> str:
        """What was checked: ``verl 0.9.1``."""
        return f"{self.package.distribution} {self.version}"

    @property
    def holds(self) -> bool:
        """Whether the overlay loads with this release."""
        return not any(finding.fatal for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: works; works with less; works, review these; or will refuse to load."""
        if not self.holds:
            fatal = [f.hook.name + _only_with(f.hook) for f in self.findings if f.fatal]
            return f"verl-fl-overlay will refuse to load on {self.release}: {', '.join(fatal)}"
        less, review = (
            ", ".join(finding.hook.name for finding in self.findings if finding.outcome is outcome)
            for outcome in (Outcome.WITHOUT, Outcome.REVIEW)
        )
        said = f"{self.release} works" + (f" with less: {less}" if less else "")
        said += f"{';' if less else ','} review these: {review}" if review else ""
        return said + (f"; {TRIAL} cannot run on it" if self.trial_breaks else "")

    @property
    def trial_breaks(self) -> bool:
        """Whether the trial step cannot run."""
        return any(comparison.breaks for comparison in self.trial)


SourceOf = Callable[[str, Package], Tree | None]
"""Returns the source of a pinned release, to show what changed since; None if the source is not available."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from going through a million nodes again and again, at the process's end too.

    Parsed files are kept, and have no cycles.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@_uncollected()
def check(tree: Tree, against: str | None = None, source_of: SourceOf = lambda release, package: None) -> Report:
    """Compare what the hooks need with what is in ``tree``, and if it is verl, in the other packages that are here.

    ``against`` names the pinned release to compare with.  By default each target is compared with the newest release
    that is not newer than its package, else with the oldest.  ``source_of`` is called only where something changed.

    Raises:
        OverlayError: verl is too old, a hooked file cannot be parsed, or ``against`` has no pins.
    """
    if against is not None and against not in tree.package.releases:
        pinned = ", ".join(tree.package.releases)
        raise OverlayError(f"{tree.package.distribution} {against} is not pinned; pinned are {pinned}")
    shim = pinning.shim_for(tree)
    beside = {p: sources.installed(p) for p in PACKAGES.values() if p != VERL} if tree.package == VERL else {}
    trees = {**beside, tree.package: tree}

    def compare(target: str, part: str = pins.HOOKS) -> Comparison:
        package = PACKAGES.get(top_level(target))
        if package is None:
            return Comparison(target, Status.UNPINNED, detail=f"nothing in {top_level(target)} is pinned")
        if package not in trees:
            return Comparison(target, Status.UNPINNED, detail=f"it is in {package.distribution}")
        found = trees[package]
        if found is None:
            return Comparison(target, Status.UNPINNED, detail=f"{package.distribution} is not installed here")
        releases = [against] if against and found is tree else _nearest_first(found)
        return _compare(found, target, pins.pinned(target, part), releases, source_of)

    def of(*targets: str) -> tuple[Comparison, ...]:
        return tuple(compared[target] for target in targets)

    compared = {target: compare(target) for hook in shim.hooks for target in (hook.target, *hook.relies_on)}

    cannot = {h.name for h in shim.hooks if any(c.breaks and not c.late for c in of(h.target, *h.relies_on))}
    findings = []
    for hook in shim.hooks:
        failed = hook if hook.name in cannot else _taken_back_with(hook, [h for h in shim.hooks if h.name in cannot])
        target, *reliances = of(hook.target, *hook.relies_on)
        outcome = _outcome(hook, shim, failed, [target, *reliances])
        meaning = _meaning(hook, outcome, shim, failed, [c.target for c in reliances if c.breaks])
        findings.append(Finding(hook, target, tuple(reliances), outcome, meaning))
    trial = tuple(compare(target, pins.TRIAL) for target in RELIES_ON) if tree.package == VERL else ()
    others = {package: found.version if found else None for package, found in trees.items() if package != VERL}
    return Report(tree.package, tree.version, tree.origin, shim.name, tuple(findings), trial, others)


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


def _nearest_first(tree: Tree) -> list[str]:
    releases = tree.package.releases
    try:
        base = Version(Version(tree.version).base_version)
    except InvalidVersion:  # of a vendor's build, whose version does not tell how old it is
        return [*reversed(releases)]
    older = [release for release in releases if Version(release) <= base]
    return [*reversed(older), *releases[len(older) :]]


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
        gone = "" if tree.source_of(module) else f"the module {module} is gone"
        return Comparison(target, Status.MISSING, against, gone, True, late)
    if found.kind == "import" != pin.kind:
        outside = f"outside {tree.package.distribution}"
        detail = f"{pin.at} -> {found.at}, {outside}; its parameters are compared only when the hook is installed"
        return Comparison(target, Status.MOVED, against, detail)
    if found == pin:
        return Comparison(target, Status.OK, against)
    diff = _diff(target, found, against, tree, source_of)
    if not found.same_contract(pin):
        known = [release for release, other in by_release.items() if found.same_contract(other)]
        change = f"{pins.signature(pin)} -> {pins.signature(found)}"
        accepted = f", which is that of {tree.package.distribution} {known[0]}" if known else ""
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
    package = tree.package.distribution
    earlier = source_of(against, tree.package)
    if earlier is None:
        return (f"(no diff: the source of {package} {against} is not to be had here)",)
    old = fingerprint(earlier, *target.split(":"))
    names = (f"{package} {against}  {old.at}", f"{package} {tree.version}  {found.at}")
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
        report.package.distribution: report.version,
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
        "packages": packages(report),
    }


def packages(report: Report) -> dict[str, dict[str, Any]]:
    """Return for each pinned package beside verl its version, None if it is not here, and its pinned releases."""
    return {
        package.distribution: {"version": version, "pinned": list(package.releases)}
        for package, version in report.others.items()
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {**vars(comparison), "status": comparison.status.value, "diff": list(comparison.diff)}
