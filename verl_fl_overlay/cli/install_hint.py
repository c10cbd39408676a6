"""``install-hint``: the lines that install a component into the environment that is here, and break nothing in it.

``ADDITIONS`` is the one place that knows them.  Other texts name the command.
"""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from verl_fl_overlay import compat
from verl_fl_overlay.cli import terminal
from verl_fl_overlay.devices import chips
from verl_fl_overlay.errors import OverlayError, UnsupportedVerlError
from verl_fl_overlay.features.flagcx import PLUGIN_FOLDER
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.versions import FITS, UNTOLD, Unmet, versions

NVIDIA = "nvidia"
GITHUB = "https://github.com/flagos-ai"


@dataclass(frozen=True)
class Way:
    """One way to install a component, or the reason why none is known.

    ``lines`` are for a shell; none if no line is known to fit.  In a line ``{constraints}`` stands for the constraints
    of the release, ``{held}`` for these and the torch that is here, ``{verl}`` for the release, and ``{make}`` for
    FlagCX's name of the chip.  ``verl`` says for which releases it is, ``nvidia`` whether it is for NVIDIA's chips
    (True), for other vendors' (False) or for any (None).  ``torch`` is the version that it brings, "" if it leaves
    torch alone.  ``unmet`` are requirements that stay unmet and were seen to do no harm: whose, its versions, of what.
    """

    why: str
    lines: tuple[str, ...] = ()
    verl: str = ""
    nvidia: bool | None = None
    torch: str = ""
    unmet: tuple[tuple[str, str, str], ...] = ()


def _made_for(module: str) -> str:
    """Return what the plugin's own documents say of the engine that it is for."""
    return "; ".join(f"{module} {fit.versions} is for {fit.other}{fit.fitting}" for fit in FITS if fit.module == module)


def _of_the_vendor(what: str) -> Way:
    """Return that wheels of the index are NVIDIA's."""
    return Way(
        f"The index has {what} for NVIDIA alone. Take the build of your chip's vendor, from its image or index, and "
        "do not let pip replace it.",
        nvidia=False,
    )


MAKE = {
    "nvidia": "NVIDIA",
    "ascend": "ASCEND",
    "metax": "METAX",
    "mthreads": "MUSA",
    "iluvatar": "ILUVATAR_COREX",
    "cambricon": "CAMBRICON",
    "kunlunxin": "KUNLUNXIN",
    "hygon": "DU",
    "amd": "AMD",
    "tsingmicro": "TSM",
    "enflame": "ENFLAME",
    "sunrise": "SUNRISE",
    "thead": "PPU",
}
"""FlagGems' name of a chip's vendor -> FlagCX's, from FlagCX's Makefile of 2026-08-22; 0.13.0 has no PPU yet."""

ADDITIONS: Mapping[str, tuple[Way, ...]] = {
    "verl": (
        Way(
            "verl, and what its engines import beyond verl's own requirements, in versions that were run together. "
            "torch is not among the constraints: install your chip's build first, else the index's newest comes.",
            ("pip install {held} verl=={verl} einops uvicorn fastapi cachetools pyzmq msgspec",),
        ),
    ),
    "flaggems": (
        Way(
            "flag-gems 5.0.0 asks for no version that this verl cannot use. Run with torch 2.11 and 2.13, triton 3.5.1 "
            "and 3.6.0. It needs the triton of your torch or vendor, which this line leaves alone.",
            ("pip install {held} flag-gems==5.0.0",),
        ),
        Way(
            "Or flag-gems 5.0.2, without the versions that it pins: numpy 1.26.4, packaging 26.0 and others. `pip "
            "check` names them from then on, and doctor has them as notes: FlagGems runs all the same.",
            ("pip install {held} sqlalchemy==2.0.48 PyYAML==6.0.3", "pip install --no-deps flag-gems==5.0.2"),
            unmet=tuple(("flag_gems", "==5.0.2", other) for other in ("numpy", "packaging", "sqlalchemy", "pyyaml")),
        ),
        Way(f"Newer ones are not on the index, and no line for them was tried: {GITHUB}/FlagGems"),
    ),
    "flagcx": (
        Way(
            f"FlagCX is not on the index: it is built from source for your chip ({GITHUB}/FlagCX, its "
            "docs/getting_started.md says what that needs). 0.13.0 was run on NVIDIA H100.",
            (
                f"git clone --recursive {GITHUB}/FlagCX",
                "make -C FlagCX USE_{make}=1",
                f"USE_{{make}}=1 pip install --no-deps --no-build-isolation FlagCX/{PLUGIN_FOLDER}",
                'export FLAGCX_PATH="$PWD/FlagCX"',
            ),
        ),
    ),
    "megatron": (
        Way(
            "megatron-core and mbridge, which were run with every release, on CPUs and an H100. TransformerEngine is "
            "not needed: without it the overlay gives Megatron's layers packed attention.",
            ("pip install {held} megatron-core==0.16.1 mbridge==0.15.1",),
        ),
    ),
    "megatron-fl": (
        Way(
            "Megatron-LM-FL is not on the index, needs Python 3.12, and takes the place of megatron-core. No line for "
            f"it was tried: {GITHUB}/Megatron-LM-FL",
        ),
    ),
    "te-fl": (
        Way(
            f"TransformerEngine-FL is not on the index: from source ({GITHUB}/TransformerEngine-FL), here without "
            "NVIDIA's compiled backend, as it was run on an H100. It takes the place of NVIDIA's transformer-engine.",
            (
                f"git clone {GITHUB}/TransformerEngine-FL",
                "TE_FL_SKIP_CUDA=1 pip install --no-deps --no-build-isolation ./TransformerEngine-FL",
                "pip install {held} pydantic importlib-metadata einops onnx onnxscript",
            ),
        ),
    ),
    "vllm": (
        Way(
            "verl's own extra, which the constraints make vLLM 0.12.0. It was resolved, and not run here.",
            ("pip install {constraints} 'verl[vllm]=={verl}' vllm==0.12.0",),
            verl="<0.9",
            nvidia=True,
            torch="2.9.0",
        ),
        Way(
            "verl's own extra, with vLLM 0.24.0 and transformers 5.9.0. Its versions contradict the constraints, so it "
            "goes without them. The line was resolved; GRPO ran with these versions on an H100.",
            ("pip install 'verl[vllm]==0.9.1'",),
            verl="==0.9.1",
            nvidia=True,
            torch="2.11.0",
        ),
        Way(
            "vLLM 0.20.2 is the newest that the constraints allow, and the one that vllm-plugin-FL 0.2 is for. It was "
            "resolved, and not run here.",
            ("pip install {constraints} verl=={verl} vllm==0.20.2",),
            verl=">=0.9",
            nvidia=True,
            torch="2.11.0",
        ),
        _of_the_vendor("vLLM"),
    ),
    "vllm-fl": (
        Way(
            f"No line is known: {_made_for('vllm_fl')}; and verl's extra takes vLLM up to 0.12.0. vllm-plugin-FL is "
            f"not on the index: {GITHUB}/vllm-plugin-FL",
            verl="<0.9",
        ),
        Way(
            f"vllm-plugin-FL is not on the index: {GITHUB}/vllm-plugin-FL. {_made_for('vllm_fl')}. Install vLLM first "
            "(verl-fl install-hint vllm), and check out the version for it. Not run here.",
            (
                f"git clone {GITHUB}/vllm-plugin-FL",
                "pip install --no-deps --no-build-isolation ./vllm-plugin-FL",
            ),
            verl=">=0.9",
        ),
    ),
    "sglang": (
        Way(
            "No line is known: the SGLang that this verl's own extra asks for wants grpcio 1.75.1, and the constraints "
            "have a Ray that wants 1.85.1. verl's images with SGLang have sets that fit: "
            "https://github.com/volcengine/verl/blob/main/docs/start/install.rst",
            verl="<0.9",
            nvidia=True,
        ),
        Way(
            "No line is known: verl's own extra contradicts itself here, its SGLang asks for a transformers that verl "
            "excludes. verl's images with SGLang have sets that fit: "
            "https://github.com/volcengine/verl/blob/main/docs/start/install.rst",
            verl="==0.9.*",
            nvidia=True,
        ),
        _of_the_vendor("SGLang"),
    ),
    "sglang-fl": (
        Way(
            f"sglang-plugin-FL is not on the index: {GITHUB}/sglang-plugin-FL. {_made_for('sglang_fl')}. It needs "
            "FlagGems (verl-fl install-hint flaggems) and PyYAML. Not run here.",
            (
                f"git clone {GITHUB}/sglang-plugin-FL",
                "pip install --no-deps ./sglang-plugin-FL",
            ),
        ),
    ),
    "flash-attn": (
        Way(
            "The overlay trains verl's defaults without it. If you want it all the same: 2.8.3, which verl 0.9.1 "
            "names, compiled for the torch that is here, which needs nvcc and takes long. Not run here.",
            ("pip install {held} --no-build-isolation flash-attn==2.8.3",),
            nvidia=True,
        ),
        _of_the_vendor("flash-attn"),
    ),
}
"""What a user may add -> the ways to install it; looked up on 2026-11-26."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    more = "They fit the verl, the torch and the chip that are here. Nothing is installed, and no index is asked."
    examples = ("verl-fl install-hint flaggems --verl 0.9.1", "verl-fl install-hint vllm --verl 0.8.0")
    exits = {0: "a line was printed", 1: "no line is known to fit; what is printed says why and where to look"}
    terminal.explain(parser, more, examples=examples, exits=exits)
    parser.add_argument("component", metavar="COMPONENT", choices=ADDITIONS, help=f"one of {', '.join(ADDITIONS)}")
    release = "for this release of verl (default: the one that is installed)"
    parser.add_argument("--verl", metavar="RELEASE", help=release)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the lines; return 1 if none is known to fit.

    Raises:
        UnsupportedVerlError: no verl is here and none is named, or the overlay is not for it.
        OverlayError: pip does not know the torch that is here, so no line could hold it.
    """
    here = versions()
    if here.get("torch") == UNTOLD:
        raise OverlayError(
            "torch can be imported here and has no metadata, so pip does not know it and would install another beside "
            "it: put its folder off PYTHONPATH, or install its wheel again"
        )
    chip, told_by = chips.chosen(Settings.parse()[0])
    release = _release(options.verl, options.component)
    found = [f"{name} {here[name]}" if name in here else f"no {name}" for name in ("torch", "triton")]
    if told_by == chips.NOTHING:  # a login node, or an image that is built
        chip, told_by = chips.CHIPS[NVIDIA], f"{told_by}, so it is taken for NVIDIA's"
    print(_comment(f"For verl {release}. Here: Python {here['Python']}, {', '.join(found)}; chip: {told_by}."))
    beside = next((f"{engine} {here[engine]}" for engine in ("vllm", "sglang") if engine in here), "")
    ways = hints(options.component, release, here.get("torch", ""), chip.vendor if chip else "", beside)
    for why, lines in ways:
        print("", _comment(why), *lines, sep="\n")
    return 0 if any(lines for _, lines in ways) else 1


def hints(component: str, release: str, torch: str, vendor: str, beside: str = "") -> list[tuple[str, list[str]]]:
    """Return the ways that fit ``release`` of verl, the ``torch`` that is here and the chip's vendor ("": not known).

    Each is the reason and its lines.  ``beside`` is the engine for rollout that is here and its version: what it was
    installed with is held, not what ``release`` was run with.
    """
    base = Version(Version(release).base_version)
    fitting = [
        _filled(way, str(base), torch, vendor, beside)
        for way in ADDITIONS[component]
        if SpecifierSet(way.verl).contains(base) and way.nvidia in (None, vendor == NVIDIA)
    ]
    return fitting or [(f"Nothing is known for verl {base}.", [])]


def constraints(verl: str) -> Path | None:
    """Return the file of versions in which the release ``verl`` was run; None if there is none for it."""
    try:
        file = Path(compat.__file__).with_name("constraints") / f"verl-{Version(verl).base_version}.txt"
    except InvalidVersion:
        return None
    return file if file.is_file() else None


def held(release: str) -> str:
    """Return pip's option that holds what was run with ``release``, "" if no constraints are known for it."""
    file = constraints(release)
    return f"-c {shlex.quote(str(file))}" if file else ""


def harmless(unmet: Unmet) -> bool:
    """Return whether a requirement is one that stays unmet where a hint was followed."""
    return any(
        (unmet.whose, unmet.other) == (whose, other) and SpecifierSet(which).contains(unmet.version)
        for ways in ADDITIONS.values()
        for way in ways
        for whose, which, other in way.unmet
    )


def _filled(way: Way, release: str, torch: str, vendor: str, beside: str) -> tuple[str, list[str]]:
    """Return why and lines with their words filled in."""
    told, lines, options = [way.why], list(way.lines), held(release)
    brings_verl = any("{verl}" in line for line in lines)
    if not options and brings_verl:
        return f"No constraints are known for verl {release}: no set of versions was run with it.", []
    if (not options or (beside and not brings_verl)) and any("{held}" in line for line in lines):
        no_use = f"were run without {beside}, which is here" if options else f"are not known for verl {release}"
        told.append(f"The constraints {no_use}: what is installed now is held in their place.")
        lines.insert(0, "pip list --format=freeze > here.txt")
        options = "-c here.txt"
    if way.torch and torch and Version(torch).public != way.torch:
        told.append(f"It replaces torch {torch} by {way.torch}: better in a fresh environment.")
    words = {
        "constraints": options,
        "held": f"{options} torch=={torch}" if torch else options,
        "verl": release,
        "make": MAKE.get(vendor, "<CHIP>"),
    }
    return " ".join(told), [line.format_map(words) for line in lines]


def _comment(text: str) -> str:
    """Wrap a comment for a shell; links stay whole."""
    return "\n".join(
        textwrap.wrap(
            text,
            terminal.columns(),
            initial_indent="# ",
            subsequent_indent="# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _release(named: str | None, component: str) -> str:
    """Return the release to answer for: the one that is named, else the one that is here, for verl else the newest."""
    found = None if named else compat.find_verl()
    release = named or (found.version if found else "")
    if not release and component == "verl":
        return compat.RELEASES[-1]
    if not release:
        raise UnsupportedVerlError(
            f"no verl is installed here: name a release with --verl (tested: {', '.join(compat.RELEASES)})"
        )
    try:
        too_old = Version(Version(release).base_version) < compat.OLDEST
    except InvalidVersion as error:
        raise UnsupportedVerlError(f"{release!r} is no version: a version is such as {compat.RELEASES[-1]}") from error
    if too_old and component == "verl" and not named:
        return compat.RELEASES[-1]
    if too_old:
        raise UnsupportedVerlError(f"verl {release} is too old: the overlay needs verl >= {compat.OLDEST}")
    return release
