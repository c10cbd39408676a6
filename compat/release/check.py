"""Whether the hooks hold on a verl that may never have been seen: its source against the pins, nothing imported."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from packaging.version import Version

from verl_fl_overlay import compat, features
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import MISSING, Fingerprint
from verl_fl_overlay.compat.release import pinning
from verl_fl_overlay.compat.release.fingerprint import elsewhere, fingerprint
from verl_fl_overlay.compat.release.sources import Tree
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.hooks import Hook
from verl_fl_overlay.settings import Settings


class Status(str, Enum):
    """What became of a pinned definition, the least worrying first."""

    OK = "OK"
    UNPINNED = "UNPINNED"
    """Outside verl, or new in the hooks: there is nothing to compare it with."""
    BODY = "BODY changed"
    MOVED = "MOVED"
    SIGNATURE = "SIGNATURE"
    MISSING = "MISSING"


@dataclass(frozen=True)
class Comparison:
    """One target against its pin in the release ``against``; ``breaks`` if a hook cannot work with what is there."""

    target: str
    status: Status
    against: str = ""
    detail: str = ""
    breaks: bool = False
    diff: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a hook meets: its target, the things it relies on, and in words what follows; ``fatal`` refuses to load."""

    hook: Hook
    target: Comparison
    reliances: tuple[Comparison, ...]
    fatal: bool
    meaning: str

    @property
    def breaks(self) -> bool:
        """Whether the target or something the hook relies on is not there as pinned."""
        return any(c.breaks for c in (self.target, *self.reliances))

    @property
    def changed(self) -> list[Comparison]:
        """The comparisons that somebody has to look at."""
        return [c for c in (self.target, *self.reliances) if c.status not in (Status.OK, Status.UNPINNED)]


@dataclass(frozen=True)
class Report:
    """The findings on one verl, a hook each."""

    version: str
    origin: str
    shim: str
    findings: tuple[Finding, ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether every required contract holds."""
        return not any(finding.fatal for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: works; works, review these; or will refuse to load."""
        fatal = [f.hook.name for f in self.findings if f.fatal]
        changed = [f.hook.name for f in self.findings if f.changed and not f.fatal]
        if fatal:
            return f"verl {self.version} will refuse to load: {', '.join(fatal)}"
        return f"verl {self.version} works" + (f", review these: {', '.join(changed)}" if changed else "")


SourceOf = Callable[[str], Tree | None]
"""Gives the source of a pinned release, to show what changed since; None if it is not to be had."""


def check(tree: Tree, against: str | None = None, source_of: SourceOf = lambda release: None) -> Report:
    """Compare what the hooks need with what is in ``tree``.

    ``against`` names the pinned release to compare with; by default it is for each target the nearest one that is not
    newer, else the oldest.  ``source_of`` is asked only for the releases against which something changed.

    Raises:
        OverlayError: verl is too old, a hooked file cannot be parsed, or ``against`` has no pins.
    """
    if against is not None and against not in compat.RELEASES:
        raise OverlayError(f"verl {against} is not pinned; pinned are {', '.join(compat.RELEASES)}")
    selection = pinning.selection_for(tree)
    releases = [against] if against else _nearest_first(tree.version)
    compared = {t: _compare(tree, t, releases, source_of) for t in pinning.targets(selection.hooks)}

    def of(target: str) -> Comparison:
        return compared.get(target, Comparison(target, Status.UNPINNED))

    broken = {h.name for h in selection.hooks if any(of(t).breaks for t in (h.target, *h.relies_on))}
    findings = []
    for hook in selection.hooks:
        group = [h for h in selection.hooks if (h.feature, h.module) == (hook.feature, hook.module)]
        fatal = hook.name in broken and any(h.required for h in group)  # one of a group that fails takes all with it
        reliances = tuple(of(target) for target in hook.relies_on)
        meaning = _meaning(hook, hook.name in broken, fatal, gone=not _module_exists(tree, hook.module))
        findings.append(Finding(hook, of(hook.target), reliances, fatal, meaning))
    return Report(tree.version, tree.origin, selection.name, tuple(findings))


def _nearest_first(version: str) -> list[str]:
    base = Version(Version(version).base_version)
    older = [release for release in compat.RELEASES if Version(release) <= base]
    return [*reversed(older), *compat.RELEASES[len(older) :]]


def _compare(tree: Tree, target: str, releases: list[str], source_of: SourceOf) -> Comparison:
    by_release = pins.pinned(target)
    against = next((release for release in releases if release in by_release), "")
    if not against:
        return Comparison(target, Status.UNPINNED)
    pin, found = by_release[against], fingerprint(tree, *target.split(":"))
    if found == MISSING:
        if places := elsewhere(tree, pin):
            return Comparison(target, Status.MOVED, against, f"{pin.at} -> {' or '.join(places)}", True)
        module = target.partition(":")[0]
        gone = "" if _module_exists(tree, module) else f"the module {module} is gone"
        return Comparison(target, Status.MISSING, against, gone, True)
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
        return Comparison(target, Status.SIGNATURE, against, change + accepted, not known, diff)
    if found.at != pin.at and found.body == pin.body:
        return Comparison(target, Status.MOVED, against, f"{pin.at} -> {found.at}; the old name still leads there")
    if found.at != pin.at:
        went_to = " or ".join(elsewhere(tree, pin)) or "nowhere"
        detail = f"{pin.at} -> {went_to}; the old name now leads to {found.at}, another function"
        return Comparison(target, Status.MOVED, against, detail, False, diff)
    return Comparison(target, Status.BODY, against, _what_of_it(pin, found), False, diff)


def _module_exists(tree: Tree, module: str) -> bool:
    path = module.replace(".", "/")
    return any(tree.has(name) for name in (f"{path}.py", f"{path}/__init__.py"))


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


def _meaning(hook: Hook, broken: bool, fatal: bool, gone: bool) -> str:
    if not broken:
        return ""
    feature = features.FEATURES[hook.feature]
    if not fatal:
        return f"{feature.name} goes on without it: {hook.why}"
    if gone and hook.needs:
        return f"{feature.name} goes on without it, which is warned about where {hook.needs} is installed: {hook.why}"
    unasked = feature.reason_off(Settings())
    when = f"when {'verl' if gone else hook.module} is imported" + (f", unless {unasked}" if unasked else "")
    where = f" (only where {hook.needs} is installed)" if hook.needs else ""
    return f"{feature.name} ({feature.summary}): the overlay refuses {when}{where}"


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
                "fatal": finding.fatal,
                "meaning": finding.meaning,
                **_comparison(finding.target),
                "relies_on": [_comparison(reliance) for reliance in finding.reliances],
            }
            for finding in report.findings
        ],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {**vars(comparison), "status": comparison.status.value, "diff": list(comparison.diff)}


def as_text(report: Report) -> str:
    """Lay the report out: a line for each hook, under it what changed and what that means, the verdict last."""
    width = max((len(f.hook.name) for f in report.findings), default=0)
    lines = [f"verl {report.version} from {report.origin}, hooks of {report.shim}", ""]
    for finding in report.findings:
        lines.append(f"{finding.hook.name:{width}}  {_summary(finding)}")
        for comparison in finding.changed:
            prefix = "" if comparison is finding.target else f"relies on {comparison.target}: "
            against = f" (against verl {comparison.against})"
            detail = f" {comparison.detail}" if comparison.detail else ""
            lines.append(f"    {prefix}{comparison.status.value}{detail}{against}")
            lines += [f"      {line}" for line in comparison.diff]
        lines += [f"    means: {finding.meaning}"] if finding.meaning else []
    return "\n".join([*lines, "", report.verdict])


def _summary(finding: Finding) -> str:
    if finding.target.status is Status.UNPINNED:
        return "not compared: outside verl" if not finding.hook.module.startswith("verl.") else "not pinned"
    worst = max((finding.target, *finding.reliances), key=lambda c: list(Status).index(c.status))
    return worst.status.value if worst is finding.target else f"{finding.target.status.value}, but see below"
