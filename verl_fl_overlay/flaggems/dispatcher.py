"""What torch's dispatcher would call: the state itself, not what somebody noted about it."""

from __future__ import annotations

import os


def registered_in(key: str, dispatch_key: str) -> str:
    """Return the source file that registered the kernel which ``aten::key`` has on ``dispatch_key``, "" if none has.

    For a kernel in Python this is the file that made its ``torch.library.Library``.
    """
    import torch

    # 35 microseconds.  torch >= 2.9 can name the kernel in 4, and loses 48 bytes of memory each time.
    for line in torch._C._dispatch_dump(f"aten::{key}").splitlines():
        name, _, rest = line.partition(": registered at ")
        if name.removesuffix("[alias]") == dispatch_key:
            return str(rest.partition(" :: ")[0].rpartition(":")[0])
    return ""


def part_of_torch(file: str) -> bool:
    """Tell whether ``file`` is one of torch's Python files."""
    import torch

    return file.startswith(os.path.dirname(torch.__file__) + os.sep)
