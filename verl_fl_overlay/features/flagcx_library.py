"""The libflagcx.so of this process: where it may lie, the one that is mapped, and a name under which it is found."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from verl_fl_overlay.errors import FlagCXError
from verl_fl_overlay.settings.conflicts import FLAGCX_LIBRARIES

LIBRARY = "libflagcx.so"
NOT_FOUND = f"{LIBRARY}: cannot open shared object file"
"""What the system's loader says of a plugin whose library it does not find."""


def within(folder: str) -> str:
    """Return the library in ``folder``: of a build, of an installation, or beside the torch plugin.

    Raises:
        FlagCXError: it holds none; names the tried places.
    """
    tried = [os.path.join(folder, place) for place in FLAGCX_LIBRARIES]
    found = next(filter(os.path.isfile, tried), "")
    if not found:
        raise FlagCXError(
            f"FLAGCX_PATH={folder} holds no {LIBRARY}; tried {', '.join(tried)}. Build FlagCX there, or set "
            "FLAGCX_PATH to where it was built"
        )
    return found


def mapped() -> list[str]:
    """Return the files of the libraries that this process has loaded; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    files = (line[line.find("/") :] for line in lines if "/" in line)
    return list(dict.fromkeys(file for file in files if os.path.basename(file).startswith(LIBRARY)))


def name(library: str) -> None:
    """Have the system's loader find ``library`` when a torch plugin asks for it by its bare name.

    FlagCX's library carries no name (SONAME), so the loader does not know it again once it was loaded by its path, and
    reads its search paths at the start of a process only.  A file in memory that carries the name, and needs
    ``library`` by its path, is found instead.

    Raises:
        FlagCXError: the library does not load here.
    """
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        file = os.memfd_create("flagcx")
        try:
            os.write(file, _named(library))
            ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
        finally:
            os.close(file)
    except (OSError, AttributeError) as error:  # AttributeError: a system without files in memory
        raise FlagCXError(f"{library} cannot be loaded: {error}. Build FlagCX for this machine") from error


def _named(library: str) -> bytes:
    """Return a shared library for the chip of ``library``: its name and what it needs, without code (64-bit ELF)."""
    with open(library, "rb") as file:
        header = file.read(64)
    order = "<" if header[5] == 1 else ">"
    chip, flags = struct.unpack_from(f"{order}H", header, 18)[0], struct.unpack_from(f"{order}I", header, 48)[0]
    texts = b"\0" + LIBRARY.encode() + b"\0" + os.fsencode(os.path.abspath(library)) + b"\0"
    start, needed, soname, strtab, symtab, strsz, syment = 64 + 2 * 56, 1, 14, 5, 6, 10, 11
    size = 7 * 16
    end = start + size + len(texts)
    entries = {
        needed: 2 + len(LIBRARY),
        soname: 1,
        strtab: start + size,
        symtab: start + size,
        strsz: len(texts),
        syment: 24,
        0: 0,
    }
    segments = ((1, 0, end, 0x10000), (2, start, size, 8))  # what is loaded, and which part of it is the table
    return b"".join(
        (
            header[:16],
            struct.pack(f"{order}HHIQQQIHHHHHH", 3, chip, 1, 0, 64, 0, flags, 64, 56, 2, 0, 0, 0),
            *(struct.pack(f"{order}IIQQQQQQ", kind, 6, at, at, at, n, n, align) for kind, at, n, align in segments),
            *(struct.pack(f"{order}qQ", *entry) for entry in entries.items()),
            texts,
        )
    )
