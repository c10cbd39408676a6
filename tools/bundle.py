"""Make an offline bundle: ``python tools/bundle.py FOLDER --torch 2.11.0 [--with vllm] [--dry-run]``; needs an index.

FOLDER gets the wheels of the overlay, verl and what is named, and this repository as it was committed.  Copy it to a
machine without a network; ``python FOLDER/install.py`` installs it there.  The versions are those of ``verl-fl
install-hint``.  torch is your chip's: it has to be there, and only its version is taken into account, unless
``--bring-torch`` is given.

For another Python or another processor than this one's, say so; pip then asks this Python where a requirement depends
on either, so that the same Python here is safer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from datetime import date
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import InvalidVersion, Version
from tables import ROOT

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from verl_fl_overlay import __version__, compat
from verl_fl_overlay.cli.install_hint import ADDITIONS, constraints, hints
from verl_fl_overlay.devices.chips import CHIPS

MACHINES = ("x86_64", "aarch64")
"""As Linux names them there."""

TESTS_NEED = ("pytest", "pytest-xdist")
SOURCE = ("antlr4-python3-runtime==4.9.3", "pylatexenc")
"""What verl's packages need and the index has as source alone; pure Python, built here."""


def requirements(component: str, release: str, torch: str, vendor: str) -> list[str]:
    """Return pip's arguments for a component, from the first way of ``verl-fl install-hint`` that a bundle can take.

    Raises:
        SystemExit: there is none: it is built from source on the machine, or no line is known.
    """
    ways = hints(component, release, torch, vendor)
    for _, lines in ways:
        lists = [shlex.split(line) for line in lines]
        if lists and all(words[:2] == ["pip", "install"] and not _options(words) for words in lists):
            return [word for words in lists for word in words[2:]]
    raise SystemExit(f"{component} cannot be put into a bundle. " + " ".join(why for why, _ in ways))


def _options(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("-") and word != "-c"]


def wanted(release: str, components: list[str], torch: str, vendor: str) -> list[str]:
    """Return pip's arguments for verl and the components.

    A component whose line brings verl, as vLLM's does, takes verl's place, with the constraints of that line or none.
    """
    asked = [requirements(name, release, torch, vendor) for name in components]
    bringing = [words for words in asked if any(word.startswith("verl") for word in words)]
    if not bringing:
        bringing = [requirements("verl", release, torch, vendor)]
        asked = [*bringing, *asked]
    held = ["-c", str(constraints(release))]
    names = [word for words in asked for word in words if word not in held]
    return [*(held if all("-c" in words for words in bringing) else []), *dict.fromkeys([f"torch=={torch}", *names])]


def target(python: str, machine: str, glibc: int) -> list[str]:
    """Return pip's options for what the bundle is for; none if that is the Python that is here."""
    if (python, machine) == (".".join(platform.python_version_tuple()[:2]), platform.machine()) and not glibc:
        return []
    tags = [f"manylinux_2_{minor}" for minor in range(glibc or 28, 4, -1)]
    tags += [
        tag
        for tag, minor in (("manylinux2014", 17), ("manylinux2010", 12), ("manylinux1", 5))
        if minor <= (glibc or 28)
    ]
    platforms = [option for tag in [*tags, "linux"] for option in ("--platform", f"{tag}_{machine}")]
    return ["--python-version", python, "--implementation", "cp", *platforms]


def left_out(torch: str, folder: Path) -> None:
    """Write a wheel that stands for torch while pip chooses versions: it has its version and requires nothing."""
    name = f"torch-{torch}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def run(*command: str, folder: Path = ROOT) -> str:
    """Run a command whose messages are shown, and return what it printed; its failure ends this program."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"no bundle was made: {shlex.join(command[:6])} ... failed, and said why above")
    return done.stdout.strip()


def pip(action: str, *arguments: str | Path, folder: Path = ROOT) -> None:
    """Run pip."""
    run(
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        action,
        *map(str, arguments),
        folder=folder,
    )


def repository(folder: Path) -> None:
    """Write all files of the commit that is checked out."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        run("git", "archive", "--format=tar", f"--output={archive.name}", "HEAD")
        with tarfile.open(archive.name) as files:
            files.extractall(folder, filter="data")


def bounded(wheels: Path, gigabytes: float) -> None:
    """Refuse wheels that take more."""
    sizes = {wheel.name: wheel.stat().st_size / 1e9 for wheel in wheels.iterdir()}
    if sum(sizes.values()) > gigabytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        named = ", ".join(f"{name} {sizes[name]:.2f}" for name in largest)
        total = f"the wheels take {sum(sizes.values()):.2f} GB, and --max-size is {gigabytes:g}"
        raise SystemExit(f"no bundle was made: {total}; the largest: {named}")


def made(folder: Path, asked: list[str], options: argparse.Namespace) -> None:
    """Fill a folder with the bundle.  The manifest comes last: without it nothing is installed."""
    wheels, parts = folder / "wheels", folder / "parts"
    parts.mkdir()
    repository(folder / "repository")
    repository(parts / "repository")  # where it is built, which leaves files
    pip("wheel", "--no-deps", "--wheel-dir", parts, parts / "repository", *SOURCE)
    (ours,) = parts.glob("verl_fl_overlay-*.whl")
    if not options.bring_torch:
        left_out(options.torch, parts)
    to = target(options.python, options.machine, options.glibc)
    pip("download", "--dest", wheels, "--only-binary=:all:", "--find-links", parts, *to, ours, *asked, *TESTS_NEED)
    if not options.bring_torch:
        next(wheels.glob(f"torch-{options.torch}-*.whl")).unlink()
    shutil.rmtree(parts)
    bounded(wheels, options.max_size)
    pins = sorted("{}=={}".format(*parse_wheel_filename(wheel.name)[:2]) for wheel in wheels.iterdir())
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n")
    shutil.copy(Path(__file__).with_name("bundle_install.py"), folder / "install.py")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        "made": date.today().isoformat(),
        "overlay": __version__,
        "commit": run("git", "rev-parse", "HEAD"),
        "verl": options.verl,
        "with": options.components,
        "torch": Version(options.torch).public,
        "brings torch": options.bring_torch,
        "python": options.python,
        "machine": options.machine,
        "sha256": {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


def main() -> int:
    """Make a bundle; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in ADDITIONS if name != "verl"]
    here = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("folder", type=Path, help="for the bundle; must be empty or not there")
    parser.add_argument("--torch", required=True, metavar="VERSION", help="the one that is there, or is to be brought")
    parser.add_argument("--bring-torch", action="store_true", help="put torch in, from the index of this machine")
    parser.add_argument("--verl", default=compat.RELEASES[-1], choices=compat.RELEASES, help="default: the newest")
    parser.add_argument(
        "--with",
        dest="components",
        action="append",
        default=[],
        choices=there,
        metavar="COMPONENT",
        help=f"one more of {', '.join(there)}",
    )
    parser.add_argument("--package", action="append", default=[], metavar="NAME==VERSION", help="one more package")
    parser.add_argument("--chip", default="nvidia", choices=CHIPS, metavar="VENDOR", help="default: nvidia")
    parser.add_argument("--python", default=here, metavar="X.Y", help=f"the one there (default: {here}, as here)")
    parser.add_argument("--machine", default=platform.machine(), choices=MACHINES, help="default: as here")
    parser.add_argument("--glibc", type=int, default=0, metavar="MINOR", help="there it is 2.MINOR (default: as here)")
    parser.add_argument("--max-size", type=float, default=20, metavar="GB", help="of all wheels (default: 20)")
    parser.add_argument("--dry-run", action="store_true", help="print what pip would be asked for, and make nothing")
    options = parser.parse_args()
    # install.py compares these with what it finds there, and refuses what is not the same.
    try:
        torch = Version(options.torch)
    except InvalidVersion:
        parser.error(f"--torch {options.torch} is no version: a version is such as 2.11.0")
    if len(torch.release) != 3:
        parser.error(f"--torch {options.torch} is no whole version: one is such as 2.11.0")
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python}: needed are two numbers, such as 3.12")
    if not options.bring_torch:
        options.torch = f"{torch.public}+left.out"
    asked = [*wanted(options.verl, options.components, options.torch, options.chip), *options.package]
    if options.dry_run:
        print(shlex.join(["pip", "download", *target(options.python, options.machine, options.glibc), *asked]))
        return 0
    folder = options.folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{folder} is there and not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        made(new, asked, options)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    wheels = [file.stat().st_size for file in (folder / "wheels").iterdir()]
    print(f"{folder}: {len(wheels)} wheels, {sum(wheels) / 1e9:.2f} GB; there: python install.py")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
