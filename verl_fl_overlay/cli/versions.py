"""The versions that are here, and whether they fit one another."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from verl_fl_overlay.packages import installed, version

VERSIONS = {
    "torch": ("torch",),
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
"""Module -> the distributions that bring it."""


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that is here, as its metadata tell; nothing is imported."""
    found = {"Python": platform.python_version()}
    for module, distributions in VERSIONS.items():
        told = next(filter(None, map(version, distributions)), "")
        found[module] = told or ("installed without metadata" if installed(module) else "")
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
_HARDWARE = "https://github.com/verl-project/verl-hardware-plugin/blob/main/docs/user_guide_flagos/nvidia"

FITS = (
    Fit("vllm_fl", "<0.1", "vllm", "==0.11.*", f"{_VLLM_FL}/8e0422d/README.md"),
    Fit("vllm_fl", "==0.1.*", "vllm", "==0.13.*", f"{_HARDWARE}/install_guidance.md"),
    Fit("vllm_fl", "==0.2.*", "vllm", "==0.20.2", f"{_VLLM_FL}/main/README.md"),
    Fit("vllm_fl", ">=0.3", "vllm", "==0.28.*", f"{_VLLM_FL}/main/README.md"),
    Fit(
        "sglang_fl", ">=0", "sglang", "==0.5.11", "https://github.com/flagos-ai/sglang-plugin-FL/blob/4eb5b2a/README.md"
    ),
    Fit("flag_gems", ">=5.0.2,<5.3", "torch", ">=2.5,<2.10", f"{_GEMS}/v5.0.2/pyproject.toml"),
    Fit("flag_gems", ">=5.3", "torch", ">=2.5,<2.12", f"{_GEMS}/v5.3.4/pyproject.toml"),
    Fit("flag_gems", ">=5.0.2", "triton", ">=3.0,<3.7", f"{_GEMS}/v5.0.2/pyproject.toml, {_VLLM_FL}/main/README.md"),
)
"""Which versions fit, where the packages' metadata do not say it; looked up on 2026-11-26.

A version of vllm-plugin-FL may name its vLLM itself (0.1.0+vllm0.13.0); that goes first.
"""


def misfits(modules: Sequence[str], here: Mapping[str, str], verl: str) -> Iterator[str]:
    """Yield which of these modules' versions ``here`` (module -> version) do not fit one another, or ``verl``'s."""
    present = [module for module in modules if module in here]
    for fit in FITS:
        if fit.module in present and fit.other in present and _within(here[fit.module], fit.versions):
            named = here[fit.module].partition(f"+{fit.other}")[2]
            fitting, source = (f"=={named}", "as its version says") if named else (fit.fitting, fit.source)
            if not _within(here[fit.other], fitting):
                made = f"{fit.module} {here[fit.module]} is made for {fit.other}{fitting} ({source})"
                yield f"{made}, and {fit.other} {here[fit.other]} is here"
    for whose, other, asked in _requirements(present, here, verl):
        if not _within(here[other], asked):
            yield f"{whose} asks for {other}{asked}, and {other} {here[other]} is here"


def _requirements(modules: Sequence[str], here: Mapping[str, str], verl: str) -> Iterator[tuple[str, str, str]]:
    """Yield what the metadata of these modules, and of verl for the engine among them, require of one another.

    That is who requires it, the module, and which versions of it.
    """
    engine = next((name for name in ("vllm", "sglang") if name in modules), "")
    for module in modules:
        for distribution in VERSIONS[module]:
            for asked in _declared(distribution):
                if (other := asked.name.replace("-", "_")) in modules:
                    yield f"{module} {here[module]}", other, str(asked.specifier)
    for asked in _declared("verl", engine):
        if asked.name == engine:
            yield f"verl {verl}", engine, str(asked.specifier)


def _declared(distribution: str, extra: str = "") -> Iterator[Requirement]:
    try:
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in texts:
        try:
            asked = Requirement(text)
        except InvalidRequirement:
            continue
        if asked.marker is None or asked.marker.evaluate({"extra": extra}):
            yield asked


def _within(text: str, specifier: str) -> bool:
    """Return whether a version is among those named; one that cannot be read is not doubted."""
    try:
        return SpecifierSet(specifier).contains(Version(text), prereleases=True)
    except InvalidVersion:
        return True
