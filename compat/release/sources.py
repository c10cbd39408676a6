"""Reads verl's source: a version on the package index, a wheel, an sdist, a folder or a git checkout.

Each of them becomes a ``Tree``.  Archives are unpacked in memory; nothing in them is executed or imported.
"""

from __future__ import annotations

import io
import lzma
import os
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

from verl_fl_overlay import compat
from verl_fl_overlay.errors import OverlayError

VERSION_FILE = "verl/version/version"
NEWEST = "latest"
"""The target that means the newest verl on the package index."""

_BROKEN = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What the archive modules raise for a truncated, damaged or encrypted file."""


@dataclass(frozen=True)
class Tree:
    """verl's files, in a folder or (if ``folder`` is None) in memory, and a text on where they came from."""

    folder: Path | None
    origin: str
    contents: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The version that verl's own file gives; a git checkout of 0.7.0 says 0.7.0.dev."""
        return (self.read(VERSION_FILE) or "").strip()

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

    def files(self) -> list[str]:
        """Return the paths of all of verl's Python files, sorted."""
        if self.folder is None:
            return sorted(path for path in self.contents if path.endswith(".py"))
        return sorted(file.relative_to(self.folder).as_posix() for file in (self.folder / "verl").rglob("*.py"))


@contextmanager
def opened(target: str) -> Iterator[Tree]:
    """Open ``target``: a version (or ``latest``), a wheel, an sdist, a folder, or ``CHECKOUT@REF``.

    Raises:
        OverlayError: it is none of these, is damaged, does not hold verl, or the index cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="verl-fl-") as scratch:
        yield _open(target, Path(scratch))


class PinnedReleases:
    """Gives the source of pinned releases: the installed verl if it is that release, else a download, made once."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._trees: dict[str, Tree | None] = {}

    def __enter__(self) -> PinnedReleases:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tree(self, release: str) -> Tree | None:
        """Return the source of ``release``; None if it is not installed and cannot be downloaded."""
        if release not in self._trees:
            self._trees[release] = self._find(release)
        return self._trees[release]

    def _find(self, release: str) -> Tree | None:
        installed = compat.find_verl()
        if installed is not None and installed.version == release:
            return Tree(Path(installed.folder).parent, "the installed verl")
        try:
            return self._stack.enter_context(opened(release))
        except OverlayError:
            return None


def _open(target: str, scratch: Path) -> Tree:
    path = Path(target).expanduser()
    if path.is_dir():
        return _holding_verl(path.parent if (path / "version" / "version").is_file() else path, f"folder {target}")
    if path.is_file():
        return _holding_verl(None, path.name, _unpacked(path))
    checkout, at, ref = target.rpartition("@")
    if at and Path(checkout).expanduser().is_dir():
        commit, contents = _at_commit(Path(checkout).expanduser(), ref)
        return _holding_verl(None, f"{ref} ({commit[:10]}) of {checkout}", contents)
    wanted = target.removeprefix("verl==")
    if wanted != NEWEST:
        try:
            Version(wanted)
        except InvalidVersion as error:
            raise OverlayError(
                f"{target!r} is no file, no folder and no version; give a version, {NEWEST}, a wheel, an sdist, "
                "the folder in which verl/ lies, or CHECKOUT@REF"
            ) from error
    _download(wanted, scratch)
    return _holding_verl(scratch, "the package index")


def _holding_verl(folder: Path | None, origin: str, contents: Mapping[str, bytes] | None = None) -> Tree:
    tree = Tree(folder, origin, contents or {})
    if not tree.version:
        raise OverlayError(f"{origin} does not hold verl: there is no {VERSION_FILE} in it")
    return tree


def _unpacked(archive: Path) -> dict[str, bytes]:
    """Return the files of verl in a wheel or an sdist."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                return _of_verl(zipped.namelist(), zipped.read, archive.name)
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

    return _of_verl(list(members), content, origin)


def _of_verl(names: list[str], content: Callable[[str], bytes], origin: str) -> dict[str, bytes]:
    """Return the files under ``verl/``, which is one folder deeper in an sdist; links are left out.

    No file is written here.  Still, an archive with an absolute path or with ".." is malicious, and is refused.

    Raises:
        OverlayError: there is such a path.
    """
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
            raise OverlayError(f"{origin} holds the path {name!r}, which climbs out of it; refused")
    versions = [name for name in names if name == VERSION_FILE or name.endswith(f"/{VERSION_FILE}")]
    root = min(versions, key=len, default="").removesuffix(VERSION_FILE)
    wanted = [name for name in names if name.startswith(f"{root}verl/") and name.endswith((".py", VERSION_FILE))]
    return {name.removeprefix(root): content(name) for name in wanted}


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


def _download(version: str, folder: Path) -> None:
    """Install the wheel of ``version`` into ``folder``: no dependencies, no sdist (building one runs its code)."""
    requirement = "verl" if version == NEWEST else f"verl=={version}"
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
