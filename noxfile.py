"""Everything that is run: ``nox -s demo``, ``nox -s compat``; ``nox -l`` lists the rest.

Each row of the matrix has an environment of its own with the constraints of its verl release.  uv makes them in
seconds where it is installed (``pip install uv``); without it pip does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import nox

HERE = Path(__file__).parent
RESULTS = HERE / "out" / "compat"
TORCH = "2.13.0"
RELEASES = ("0.7.0", "0.7.1", "0.8.0", "0.9.0", "0.9.1")
# What verl's engines import beyond verl's own requirements; see constraints for the versions.
ENGINE_NEEDS = ("einops", "uvicorn", "fastapi", "cachetools", "pyzmq", "msgspec")

# The real FlagGems, whose device probes its tests answer; it needs triton, which a CPU build of torch does not bring.
FLAGGEMS = ("triton==3.5.1", "flag-gems==5.0.0")
# Nearly every test is a process of its own that imports verl, which is seconds of one core.
BOTH = ("-n", "2", "--dist", "loadgroup")

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "drift", "compat", "features"]


def rows() -> list[nox.param]:
    """Return the rows of the matrix: every release with one torch, the newest also with the torch that it pins."""
    made = []
    for release in RELEASES:
        tags = ["ci", *(["oldest"] if release == RELEASES[0] else []), *(["latest"] if release == RELEASES[-1] else [])]
        made.append(nox.param(release, TORCH, id=f"verl='{release}'", tags=tags))
    pinned = "2.11.0"
    made.append(nox.param(RELEASES[-1], pinned, id=f"verl='{RELEASES[-1]}', torch='{pinned}'", tags=["ci"]))
    return made


def installer_environment() -> dict[str, str]:
    """Return pip's own search places for uv, which does not read pip's settings."""
    links = os.environ.get("PIP_FIND_LINKS")
    if links is None:
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
            capture_output=True,
            text=True,
            check=False,
        )
        links = asked.stdout.strip()
    return {"UV_FIND_LINKS": ",".join(links.split())} if links else {}


def install(session: nox.Session, verl: str, torch: str, *more: str) -> None:
    """Install one row: torch, verl, what its engines need, the overlay; and check that they fit together."""
    constraints = HERE / "compat" / "constraints" / f"verl-{verl}.txt"
    needs = [f"verl=={verl}", f"torch=={torch}", *ENGINE_NEEDS, "pytest", "pytest-xdist", *more]
    session.install(*needs, "-c", str(constraints), env=installer_environment())
    session.install("--force-reinstall", "--no-deps", ".")
    if session.venv_backend == "uv":
        session.run("uv", "pip", "check", external=True)
    else:
        session.run("python", "-m", "pip", "check")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types (strict) and the seam: outside compat nothing imports verl."""
    session.install("ruff", "mypy", "import-linter", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    # On the installed package, from elsewhere: in this folder compat does not lie where it is imported from.
    settings = str(HERE / "pyproject.toml")
    session.chdir(session.create_tmp())
    session.run("mypy", "--config-file", settings, "-p", "verl_fl_overlay")
    session.run("lint-imports", "--config", settings)


@nox.session
def unit(session: nox.Session) -> None:
    """What needs neither verl nor torch."""
    session.install(".", "pytest")
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session(python=["3.10", "3.11", "3.12"], default=False)
def minimum(session: nox.Session) -> None:
    """The oldest dependencies that pyproject allows, on every Python that is here."""
    dependencies = nox.project.load_toml(HERE / "pyproject.toml")["project"]["dependencies"]
    session.install(".", "pytest", *(dependency.split(",")[0].replace(">=", "==") for dependency in dependencies))
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session
def drift(session: nox.Session) -> None:
    """The pins against the wheel of every release, and upstream changes of every kind; neither verl nor torch."""
    wheels = HERE / "out" / "wheels"
    for release in RELEASES:
        if not list(wheels.glob(f"verl-{release}-*.whl")):
            download = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
            session.run(sys.executable, *download, f"verl=={release}", external=True)
    session.install(".", "pytest", "pytest-xdist")
    session.run("pytest", "tests/unit", "tests/drift", *BOTH, *session.posargs, env={"VERL_WHEELS": str(wheels)})


@nox.session
def loading(session: nox.Session) -> None:
    """The overlay in processes that start in unusual ways, on the newest release."""
    install(session, RELEASES[-1], TORCH)
    session.run("pytest", "tests/loading", *BOTH, *session.posargs)


@nox.session(default=False)
def upstream(session: nox.Session) -> None:
    """verl's own CPU tests with and without the overlay: ``nox -s upstream -- [--verl-source TREE] [--only PART]``."""
    install(session, RELEASES[-1], TORCH, "pytest-timeout", "pytest-asyncio")
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
        session.run("python", ".ci/next.py", str(checked))
        return
    result.unlink(missing_ok=True)
    session.install(f"verl=={newest['verl']}", f"torch=={TORCH}", *ENGINE_NEEDS, env=installer_environment())
    tests = ("tests/contract", "tests/train", "-n", "2", "--dist", "loadgroup", f"--junitxml={result}")
    session.run("pytest", *tests, *session.posargs, success_codes=[0, 1])
    session.run("python", ".ci/next.py", str(checked), str(result))


@nox.session(tags=["demo"])
def demo(session: nox.Session) -> None:
    """verl's own SFT trainer on this machine's CPU: ``nox -s demo [-- --verl 0.7.0]``; ``-- grpo``: its main_ppo."""
    if session.posargs[:1] == ["grpo"]:
        install(session, RELEASES[-1], TORCH, "TransferQueue", "matplotlib")
        session.run("python", "examples/grpo.py", "out/demo-grpo", *session.posargs[1:])
        return
    parser = argparse.ArgumentParser(prog="nox -s demo --")
    parser.add_argument("--verl", default=RELEASES[-1], choices=RELEASES, help="default: the newest")
    options, more = parser.parse_known_args(session.posargs)
    install(session, options.verl, TORCH)
    session.run("python", "examples/sft.py", f"out/demo-{options.verl}", *more)


@nox.session
@nox.parametrize(["verl", "torch"], rows())
def compat(session: nox.Session, verl: str, torch: str) -> None:
    """One row of the matrix on the CPU: contract tests, then training with real engines and verl's own trainer."""
    session.notify("cuda")
    session.notify("report")
    result = RESULTS / f"verl-{verl}-torch-{torch}-cpu".replace(".", "_")
    newest = (verl, torch) == (RELEASES[-1], TORCH)
    install(session, verl, torch, *(FLAGGEMS if newest else ()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    row = {"verl": verl, "torch": torch, "device": "cpu", "python": python_version(session)}
    result.with_suffix(".json").write_text(json.dumps(row))
    folders = ["contract", "train", *(("flaggems", "logprobs") if newest else ())]
    tests = [f"tests/{folder}" for folder in folders]
    session.run("pytest", *tests, *BOTH, f"--junitxml={result}.xml", *session.posargs)


@nox.session(tags=["features"])
@nox.parametrize("verl", [nox.param("0.7.1", id="verl='0.7.1'"), nox.param("0.9.1", id="verl='0.9.1'")])
def features(session: nox.Session, verl: str) -> None:
    """What the matrix leaves out, on the newest release and on the last one that has legacy workers."""
    install(session, verl, TORCH)
    others = ("fused", "faults", "parity") if verl == RELEASES[-1] else ("legacy", "logprobs")
    for folder in ("process", "process_group", "chips", *others):
        session.run("pytest", f"tests/{folder}", *BOTH, *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in ("0.7.1", "0.9.0", "0.9.1")])
def ray(session: nox.Session, verl: str) -> None:
    """A cluster that was started with an empty environment, and GRPO on verl 0.9.1: minutes of both cores."""
    install(session, verl, TORCH, *(["TransferQueue", "matplotlib"] if verl == RELEASES[-1] else []))
    session.run("pytest", "tests/ray", *session.posargs)


@nox.session(default=False)
@nox.parametrize("verl", [nox.param(v, id=f"verl='{v}'") for v in RELEASES])
def megatron(session: nox.Session, verl: str) -> None:
    """Megatron's real classes and, on verl 0.9.1, its engine training on a CPU."""
    install(session, verl, TORCH, "megatron-core==0.16.1", "mbridge")
    session.run("pytest", "tests/megatron", *session.posargs)


def python_version(session: nox.Session) -> str:
    """Return the version of the session's interpreter."""
    said = session.run("python", "-c", "import platform; print(platform.python_version())", silent=True)
    return str(said).strip()


@nox.session(venv_backend="none", default=False)
def cuda(session: nox.Session) -> None:
    """The GPU tests in the environment that is here; without a GPU the row says that it was not run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = RESULTS / "here-cuda"
    ask = "import torch, verl; assert torch.cuda.is_available(), 'no CUDA device'; "
    ask += "print(verl.__version__, torch.__version__)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    row = {"verl": "-", "torch": "-", "device": "cuda", "python": platform.python_version()}
    result.with_suffix(".xml").unlink(missing_ok=True)
    if found.returncode:
        row["not run"] = (found.stderr.strip().splitlines() or ["no answer"])[-1]
        result.with_suffix(".json").write_text(json.dumps(row))
        session.skip(f"not run: {row['not run']}")
    row["verl"], row["torch"] = found.stdout.split()[-2:]
    result.with_suffix(".json").write_text(json.dumps(row))
    session.run(sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={result}.xml", external=True)


@nox.session(venv_backend="none", default=False)
def report(session: nox.Session) -> None:
    """The table of the matrix, from the results on disk and never from exit statuses."""
    session.run(sys.executable, ".ci/matrix.py", str(RESULTS), external=True)
