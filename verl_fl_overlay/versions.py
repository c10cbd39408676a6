"""The versions that are here, and whether they fit one another."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from verl_fl_overlay.packages import installed, version

VERSIONS = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "triton": ("triton", "flagtree", "pytorch-triton", "triton-ascend"),
    "flag_gems": ("flag-gems",),
    "flagcx": ("flagcx",),
    "vllm": ("vllm",),
    "vllm_fl": ("vllm-plugin-fl", "vllm-fl"),
    "sglang": ("sglang",),
    "sglang_fl": ("sglang-fl",),
    "transformer_engine": ("transformer-engine",),
    "ray": ("ray",),
    "transformers": ("transformers",),
    "flash_attn": ("flash-attn",),
    "wrapt": ("wrapt",),
}
"""Module -> the distributions that bring it, one of which is enough."""

UNTOLD = "installed without metadata"
"""What stands for the version of a package that can be imported, and that pip does not know."""

_MODULES = {distribution: module for module, several in VERSIONS.items() for distribution in several}


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that is here, as its metadata tell; nothing is imported."""
    found = {"Python": platform.python_version()}
    for module, distributions in VERSIONS.items():
        told = next(filter(None, map(version, distributions)), "")
        found[module] = told or (UNTOLD if installed(module) else "")
    return {name: told for name, told in found.items() if told}


@dataclass(frozen=True)
class Fit:
    """What a component's own documents say: its ``versions`` are made for these versions of ``other``."""

    module: str
    versions: str
    other: str
    fitting: str
    source: str


_GEMS = "https://github.com/flagos-ai/FlagGems/blob"
_VLLM_FL = "https://github.com/flagos-ai/vllm-plugin-FL/blob"
_HARDWARE = "https://github.com/verl-project/verl-hardware-plugin/blob/a7f2d79/docs/user_guide_flagos/nvidia"

FITS = (
    Fit("vllm_fl", "<0.1", "vllm", "==0.11.*", f"{_VLLM_FL}/8e0422d/README.md"),
    Fit("vllm_fl", "==0.1.*", "vllm", "==0.13.*", f"{_HARDWARE}/install_guidance.md"),
    Fit("vllm_fl", "==0.2.*", "vllm", "==0.20.2", f"{_VLLM_FL}/main/README.md"),
    Fit("vllm_fl", "==0.3.*", "vllm", "==0.24.0", f"{_VLLM_FL}/main/docker/musa/README.md"),
    Fit("vllm_fl", ">=0.4", "vllm", "==0.28.*", f"{_VLLM_FL}/main/README.md"),
    Fit(
        "sglang_fl", ">=0", "sglang", "==0.5.11", "https://github.com/flagos-ai/sglang-plugin-FL/blob/4eb5b2a/README.md"
    ),
    Fit("torch", "<2.3", "numpy", "<2", "https://github.com/pytorch/pytorch/issues/107302"),
    Fit("flag_gems", ">=5.0.2,<5.3", "torch", ">=2.5,<2.10", f"{_GEMS}/v5.0.2/pyproject.toml"),
    Fit("flag_gems", ">=5.3", "torch", ">=2.5,<2.12", f"{_GEMS}/v5.3.4/pyproject.toml"),
    Fit("flag_gems", ">=5.0.2", "triton", ">=3.0,<3.7", f"{_GEMS}/v5.0.2/pyproject.toml, {_VLLM_FL}/main/README.md"),
)
"""Which versions fit, where the packages' metadata do not say it; looked up on 2026-11-26.

What a plugin says of its engine itself goes first (``_says``): a vllm-plugin-FL that was installed from its source
without tags calls itself 0.0.0, whatever vLLM it is for.
"""


def misfits(modules: Sequence[str], here: Mapping[str, str], verl: str) -> Iterator[str]:
    """Yield which of these modules' versions ``here`` (module -> version) do not fit one another, or ``verl``'s."""
    present = [module for module in modules if module in here]
    for fit in FITS:
        if fit.module in present and fit.other in present and _within(here[fit.module], fit.versions):
            fitting, source = _says(fit.module, here[fit.module], fit.other) or (fit.fitting, fit.source)
            if not _within(here[fit.other], fitting):
                made = f"{fit.module} {here[fit.module]} is made for {fit.other}{fitting} ({source})"
                yield f"{made}, and {fit.other} {here[fit.other]} is here"
    for engine in ("vllm", "sglang"):
        if engine in present:
            for asked in _wanted(_metadata("verl")[1], engine):
                if asked.name == engine and not _within(here[engine], str(asked.specifier)):
                    yield str(Unmet("verl", verl, engine, str(asked.specifier), here[engine]))


def _says(module: str, told: str, other: str) -> tuple[str, str] | None:
    """Return which versions of ``other`` a component of version ``told`` names itself, and where; None if it does not.

    vllm-plugin-FL names its vLLM in some versions (0.1.0+vllm0.13.0), and in most in what its tests need.
    """
    if named := told.partition(f"+{other}")[2]:
        return f"=={named}", "as its version says"
    for distribution in VERSIONS[module]:
        for asked in _wanted(_metadata(distribution)[1], "test"):
            if asked.name == other and asked.specifier:
                return str(asked.specifier), "as its tests ask for"
    return None


@dataclass(frozen=True)
class Unmet:
    """A requirement that the versions which are here do not meet: ``whose`` of ``version`` asks for ``other``.

    ``here`` is the version of ``other`` that is here, "" if it is not installed.  It is ``deep`` if nothing that was
    asked about requires it itself.
    """

    whose: str
    version: str
    other: str
    fitting: str
    here: str
    deep: bool = False

    def __str__(self) -> str:
        """Return the sentence that tells it."""
        found = f"{self.other} {self.here} is here" if self.here else "it is not installed"
        return f"{self.whose} {self.version} asks for {self.other}{self.fitting}, and {found}"


def unmet(distributions: Iterable[str], here: Mapping[str, str]) -> Iterator[Unmet]:
    """Yield which requirements are not met, of these distributions and of all that they require, as ``pip check`` does.

    Only metadata are read.  ``here`` (module -> version) goes before them.
    """
    read = functools.cache(_metadata)
    roots = {canonicalize_name(name) for name in distributions}
    waiting = deque((name, "") for name in sorted(roots))
    seen = set(waiting)
    while waiting:
        whose, extra = waiting.popleft()
        told, texts = read(whose)
        for asked in _wanted(texts, extra):
            name = canonicalize_name(asked.name)
            module = _MODULES.get(name, name)
            found = here.get(module) or read(name)[0]
            if found and _within(found, str(asked.specifier)):
                new = {(name, more) for more in ("", *asked.extras)} - seen
                seen |= new
                waiting.extend(sorted(new))
            elif found or not any(map(version, VERSIONS.get(module, ()))):  # a vendor's triton has a name of its own
                label = _MODULES.get(whose, whose)
                yield Unmet(label, here.get(label) or told, module, str(asked.specifier), found, whose not in roots)


def _metadata(distribution: str) -> tuple[str, list[str]]:
    """Return version and requirements of an installed distribution; "" and none if it is not installed."""
    try:
        told = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "", []
    return told["Version"] or "", told.get_all("Requires-Dist") or []


def _wanted(texts: Iterable[str], extra: str) -> Iterator[Requirement]:
    """Yield the requirements that hold on this machine, for ``extra`` if that is not ""."""
    for text in texts:
        if not extra and "extra ==" in text:  # most are of extras, and reading one takes a tenth of a millisecond
            continue
        try:
            asked = Requirement(text)
            wanted = asked.marker is None or asked.marker.evaluate({"extra": extra})
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName):
            continue
        if wanted:
            yield asked


def _within(text: str, specifier: str) -> bool:
    """Return whether a version is among those named; one that cannot be read is not doubted."""
    try:
        return SpecifierSet(specifier).contains(Version(text), prereleases=True)
    except InvalidVersion:
        return True
