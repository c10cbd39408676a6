"""Reads the source of verl, or of another pinned package: a version on the index, a wheel, an sdist, a folder ...

Each of them becomes a ``Tree``.  Archives are unpacked in memory; nothing in them is executed or imported.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from packaging.version import InvalidVersion, Version

from verl_fl_overlay.compat.pins import PACKAGES, VERL, Package
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.packages import folders

NEWEST = "latest"
"""The version that means the newest one on the package index."""

_BROKEN = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What the archive modules raise for a truncated, damaged or encrypted file."""


@dataclass(frozen=True)
class Tree:
    """A package's files, in a folder or (if ``folder`` is None) in memory, and a text on where they came from."""

    folder: Path | None
    origin: str
    contents: Mapping[str, bytes] = field(default_factory=dict)
    package: Package = VERL

    @property
    def version(self) -> str:
        """The version that the package's own file gives; a git checkout of verl 0.7.0 says 0.7.0.dev."""
        text = self.read(self.package.version_file) or ""
        return _assigned_version(text) if self.package.version_file.endswith(".py") else text.strip()

    def has(self, path: str) -> bool:
        """Say whether there is a file ``path``."""
        return path in self.contents if self.folder is None else (self.folder / path).is_file()

    def read(self, path: str) -> str | None:
        """Return the text of ``path`` (such as ``verl/protocol.py``), None if there is no such file.

        Raises:
            OverlayError: it is not UTF-8.
        """
        if not self.has(path):
            return None
        try:
            return (self.contents[path] if self.folder is None else (self.folder / path).read_bytes()).decode()
        except UnicodeDecodeError as error:
            raise OverlayError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error

    def source_of(self, module: str) -> str | None:
        """Return the path of the file of ``module`` (such as ``verl.protocol``), None if it has no source here."""
        path = module.replace(".", "/")
        return next(filter(self.has, (f"{path}.py", f"{path}/__init__.py")), None)

    def files(self) -> list[str]:
        """Return the paths of all of the package's Python files, sorted."""
        if self.folder is None:
            return sorted(path for path in self.contents if path.endswith(".py"))
        found = (self.folder / self.package.name).rglob("*.py")
        return sorted(file.relative_to(self.folder).as_posix() for file in found)


def _assigned_version(text: str) -> str:
    """Return the version that a file of Python assigns, as a whole or as MAJOR, MINOR, PATCH and PRE_RELEASE."""
    if whole := re.search(r"""^__version__ = ["']([^"']+)["']\s*(#|$)""", text, re.MULTILINE):
        return str(whole[1])
    parts: dict[str, str] = dict(re.findall(r"""^([A-Z_]+) = ["']?([\w.]*)""", text, re.MULTILINE))
    return ".".join(parts[name] for name in ("MAJOR", "MINOR", "PATCH") if name in parts) + parts.get("PRE_RELEASE", "")


@contextmanager
def opened(target: str) -> Iterator[Tree]:
    """Open ``target``: a version (or ``latest``), a wheel, an sdist, a folder, or ``CHECKOUT@REF``.

    A version is verl's; ``transformers==5.9.0`` is another package's.  The other targets show what they hold.

    Raises:
        OverlayError: it is none of these, is damaged, holds no pinned package, or the index cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="verl-fl-") as scratch:
        yield _open(target, Path(scratch))


def installed(package: Package) -> Tree | None:
    """Return the source of the ``package`` that is installed here, None if there is none; it is not imported."""
    trees = (Tree(Path(folder).parent, "the installed one", package=package) for folder in folders(package.name))
    return next((tree for tree in trees if tree.version), None)


class PinnedReleases:
    """Gives the source of pinned releases: the installed package if it is that one, else a download, made once."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._trees: dict[tuple[str, Package], Tree | None] = {}

    def __enter__(self) -> PinnedReleases:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tree(self, release: str, package: Package) -> Tree | None:
        """Return the source of ``release``; None if it is not installed and cannot be downloaded."""
        if (release, package) not in self._trees:
            self._trees[release, package] = self._find(release, package)
        return self._trees[release, package]

    def _find(self, release: str, package: Package) -> Tree | None:
        here = installed(package)
        if here is not None and here.version == release:
            return here
        try:
            return self._stack.enter_context(opened(f"{package.distribution}=={release}"))
        except OverlayError:
            return None


def _open(target: str, scratch: Path) -> Tree:
    path = _path(target)
    if path.is_dir():
        origin, own = f"folder {target}", PACKAGES.get(path.absolute().name)
        itself = [Tree(path.absolute().parent, origin, package=own)] if own else []
        return _held(origin, [*itself, *_possible(path, origin)])
    if path.is_file():
        return _held(path.name, _possible(None, path.name, _unpacked(path)))
    checkout, at, ref = target.rpartition("@")
    if at and _path(checkout).is_dir():
        commit, contents = _at_commit(_path(checkout), ref)
        origin = f"{ref} ({commit[:10]}) of {checkout}"
        return _held(origin, _possible(None, origin, contents))
    name, _, version = target.rpartition("==")
    package = next((p for p in PACKAGES.values() if p.distribution == (name or VERL.distribution)), None)
    if package is None or not _is_version(version):
        raise OverlayError(
            f"{target!r} is no file, no folder and no version; give a version, {NEWEST}, a wheel, an sdist, "
            "the folder in which verl/ lies, or CHECKOUT@REF"
        )
    _download(package, version, scratch)
    return _held("the package index", [Tree(scratch, "the package index", package=package)])


def _path(text: str) -> Path:
    """Return a path as a shell would; ``~`` of a user who is not known is part of a name, as it is there."""
    return Path(os.path.expanduser(text))


def _is_version(text: str) -> bool:
    try:
        return text == NEWEST or bool(Version(text))
    except InvalidVersion:
        return False


def _possible(folder: Path | None, origin: str, contents: Mapping[str, bytes] | None = None) -> list[Tree]:
    """Return the files as a tree of each package that they may be."""
    return [Tree(folder, origin, contents or {}, package) for package in PACKAGES.values()]


def _held(origin: str, trees: list[Tree]) -> Tree:
    """Return the first of ``trees`` that has a version.

    Raises:
        OverlayError: there is none.
    """
    if found := next((tree for tree in trees if tree.version), None):
        return found
    packages = dict.fromkeys(tree.package for tree in trees)
    names, files = (
        " or ".join(names) for names in zip(*((p.distribution, p.version_file) for p in packages), strict=True)
    )
    raise OverlayError(f"{origin} does not hold {names}: there is no {files} in it, or no version in that")


def _unpacked(archive: Path) -> dict[str, bytes]:
    """Return the files of the package in a wheel or an sdist."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                return _of_package(zipped.namelist(), zipped.read, archive.name)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tarred:
                contents = _untarred(tarred, archive.name)
                while tarred.fileobj and tarred.fileobj.read(1 << 16):  # to the end, where the checksum is
                    pass
                return contents
    except OverlayError:
        raise
    except _BROKEN as error:
        raise OverlayError(f"{archive.name} is damaged: {error}") from error
    raise OverlayError(f"{archive.name} is neither a wheel nor an sdist, or is cut short: it cannot be read")


def _untarred(tarred: tarfile.TarFile, origin: str) -> dict[str, bytes]:
    members = {member.name: member for member in tarred.getmembers() if member.isfile()}

    def content(name: str) -> bytes:
        file = tarred.extractfile(members[name])
        return file.read() if file else b""

    return _of_package(list(members), content, origin)


def _of_package(names: list[str], content: Callable[[str], bytes], origin: str) -> dict[str, bytes]:
    """Return the files under ``verl/`` or another package, which is deeper in an sdist; links are left out.

    No file is written here.  Still, an archive with an absolute path or with ".." is malicious, and is refused.

    Raises:
        OverlayError: there is such a path.
    """
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
            raise OverlayError(f"{origin} holds the path {name!r}, which climbs out of it; refused")
    for package in PACKAGES.values():
        file = package.version_file
        versions = [name for name in names if name == file or name.endswith(f"/{file}")]
        if versions:
            root = min(versions, key=len).removesuffix(file)
            wanted = [
                name for name in names if name.startswith(f"{root}{package.name}/") and name.endswith((".py", file))
            ]
            return {name.removeprefix(root): content(name) for name in wanted}
    return {}


def _at_commit(checkout: Path, ref: str) -> tuple[str, dict[str, bytes]]:
    """Return the commit that ``ref`` names, and ``verl/`` in that commit; the checkout's files are not touched."""
    if ref.startswith("-"):
        raise OverlayError(f"{ref!r} is no git ref")
    commit = _git(checkout, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if commit is None:
        raise OverlayError(f"{checkout} is not a git checkout that knows {ref!r}: git fetch --tags, or correct the ref")
    name = commit.decode().strip()
    archive = _git(checkout, "archive", "--format=tar", name, "verl")
    if archive is None:
        raise OverlayError(f"{ref} of {checkout} does not hold verl: there is no folder verl/ in it")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tarred:
        return name, _untarred(tarred, ref)


def _git(checkout: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise OverlayError("git is not installed; name a folder or a wheel instead") from error
    return done.stdout if done.returncode == 0 else None


def _download(package: Package, version: str, folder: Path) -> None:
    """Install the wheel of ``version`` into ``folder``: no dependencies, no sdist (building one runs its code)."""
    requirement = package.distribution if version == NEWEST else f"{package.distribution}=={version}"
    command = [*_installer(), "--no-deps", "--only-binary", ":all:", "--target", str(folder), requirement]
    environment = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"}
    environment.update({"UV_HTTP_TIMEOUT": "15", "UV_HTTP_RETRIES": "1", **os.environ})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    said = " ".join(" ".join(errors[:1]).split()).removeprefix("ERROR: ")
    if any(
        sign in done.stderr.lower() for sign in ("from versions: none", "retrying", "connect", "error sending request")
    ):
        raise OverlayError(f"the package index cannot be reached for {requirement}; name a wheel or a folder instead")
    raise OverlayError(f"the package index does not give {requirement}: {said}")


def _installer() -> list[str]:
    """Return the install command of pip or uv, whichever is here, so that the user's index settings apply."""
    pip = ["install", "--quiet", "--no-compile"]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", *pip]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if found := shutil.which("pip"):
        return [found, *pip]
    raise OverlayError("a version is fetched by pip or uv, and neither is here; name a wheel or a folder instead")
