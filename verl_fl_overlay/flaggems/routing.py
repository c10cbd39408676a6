"""Puts kernels in the place of torch's own, and takes them back."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

from verl_fl_overlay.flaggems.library import Kernel

logger = logging.getLogger("verl_fl_overlay")


class Router:
    """Registers ``kernels`` in a ``torch.library.Library`` of its own between ``enter`` and ``leave``.

    If another package's Python kernel holds a dispatch key, the router does not touch it and names it in ``held``.  A
    kernel that cannot be registered is left out from then on and named in ``failed``; the others stay.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.kernels = tuple(kernels)
        self.held: dict[str, str] = {}
        """Aten key -> the file that registered the kernel which holds it."""
        self.failed: dict[str, str] = {}
        self._library: Any = None
        self._claims: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether the kernels are in place now."""
        return self._library is not None

    def enter(self) -> None:
        """Put the kernels in place, unless they are there already."""
        import torch

        if self._library is not None:
            return
        self._library = library = torch.library.Library("aten", "IMPL")
        taken = torch.library._impls
        for kernel in self.kernels:
            if kernel.key in self.failed:
                continue
            for dispatch_key in kernel.dispatch_keys:
                claim = f"aten/{kernel.key}/{dispatch_key}"
                options: dict[str, bool] = {}
                if claim not in taken:
                    self.held.pop(kernel.key, None)
                else:
                    holder = self.held.get(kernel.key) or registered_in(kernel.key, dispatch_key)
                    if not _part_of_torch(holder) or not _can_override():
                        self._note_held(kernel.key, holder)
                        continue
                    options = {"allow_override": True}
                    self._claims.add(claim)
                try:
                    library.impl(kernel.key, kernel.function, dispatch_key, **options)
                except Exception as error:
                    self._note_failed(kernel, dispatch_key, error)

    def leave(self) -> None:
        """Take the kernels back, and restore whatever was there before, torch's or other packages' kernels."""
        import torch

        if self._library is None:
            return
        library, self._library = self._library, None
        library._destroy()
        del library
        # Both removed all claims of our library, among them those that torch's own Python kernels had before.
        torch.library._impls.update(self._claims)
        self._claims.clear()

    def _note_held(self, key: str, holder: str) -> None:
        if not self.held:
            logger.warning("aten::%s is held by %s, and maybe others are: they are left to it", key, holder)
        self.held[key] = holder

    def _note_failed(self, kernel: Kernel, dispatch_key: str, error: Exception) -> None:
        self.failed[kernel.key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.warning(
            "FlagGems' %s cannot be registered for aten::%s on %s and stays out: %s",
            kernel.name,
            kernel.key,
            dispatch_key,
            self.failed[kernel.key],
        )


def registered_in(key: str, dispatch_key: str) -> str:
    """Return the source file that registered the kernel which ``aten::key`` has on ``dispatch_key``, "" if none has."""
    import torch

    for line in torch._C._dispatch_dump(f"aten::{key}").splitlines():
        name, _, rest = line.partition(": registered at ")
        if name.removesuffix("[alias]") == dispatch_key:
            return str(rest.partition(" :: ")[0].rpartition(":")[0])
    return ""


def _part_of_torch(file: str) -> bool:
    import torch

    return file.startswith(os.path.dirname(torch.__file__) + os.sep)


def _can_override() -> bool:
    """Tell whether this torch (2.8 and newer) can put a Python kernel over another."""
    import torch

    return "allow_override" in inspect.signature(torch.library.Library.impl).parameters
