"""Puts kernels in the place of torch's own, and takes them back."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Sequence
from typing import Any

from verl_fl_overlay.flaggems.dispatcher import part_of_torch, registered_in
from verl_fl_overlay.flaggems.library import Kernel
from verl_fl_overlay.flaggems.registrar import RegistrarNote

logger = logging.getLogger("verl_fl_overlay")

LOOKED_AT = 32
"""How many kernels are looked at when the phase is left: a millisecond."""


class Router:
    """Registers ``kernels`` in a ``torch.library.Library`` of its own between ``enter`` and ``leave``.

    If another package's Python kernel holds a dispatch key, the router does not touch it and names it in ``held``.  A
    kernel that cannot be registered is left out from then on and named in ``failed``; the others stay.
    """

    def __init__(self, kernels: Sequence[Kernel], registrar: Any = None) -> None:
        """Take the kernels, and FlagGems' own registrar (``FlagGems.registrar``) for them."""
        self.kernels = tuple(kernels)
        self.held: dict[str, str] = {}
        """Aten key -> the file that registered the kernel which holds it."""
        self.failed: dict[str, str] = {}
        self._library: Any = None
        self._note = RegistrarNote(registrar)
        self._claims: set[str] = set()
        self._turn = 0

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
        self._note.write(self.kernels)
        taken = torch.library._impls
        for kernel in self.kernels:
            if kernel.key in self.failed:
                continue
            holder = self._holder(kernel, taken)
            if holder is not None:
                self._note_held(kernel.key, holder)
                continue
            self.held.pop(kernel.key, None)
            for dispatch_key in reversed(kernel.dispatch_keys):  # autograd's first: the others alone cut a gradient
                claim = f"aten/{kernel.key}/{dispatch_key}"
                options: dict[str, bool] = {}
                if claim in taken:
                    options = {"allow_override": True}
                    self._claims.add(claim)
                try:
                    library.impl(kernel.key, kernel.function, dispatch_key, **options)
                except Exception as error:
                    self._note_failed(kernel, dispatch_key, error)
                    break

    def _holder(self, kernel: Kernel, taken: Collection[str]) -> str | None:
        """Return the file that holds one of the kernel's dispatch keys and cannot be overridden; None if none is."""
        for dispatch_key in kernel.dispatch_keys:
            if f"aten/{kernel.key}/{dispatch_key}" in taken:
                file = self.held.get(kernel.key) or registered_in(kernel.key, dispatch_key)
                if not part_of_torch(file) or not _can_override():
                    return file
        return None

    def leave(self) -> None:
        """Take the kernels back, and restore whatever was there before, torch's or other packages' kernels.

        A kernel that somebody put over ours meanwhile stays, and is in ``held`` afterwards.
        """
        import torch

        if self._library is None:
            return
        library, self._library = self._library, None
        if _can_override():  # else nobody can have been put over ours
            self._look(sorted(library._op_impls))
        library._destroy()
        del library
        self._note.take_back()
        # All claims of our library are removed with it, among them those that others have too: torch's own Python
        # kernels under ours, and kernels that were put over ours.
        torch.library._impls.update(self._claims)
        self._claims.clear()

    def _look(self, claims: list[str]) -> None:
        """Look whether our kernels are still what torch calls: all of them if FlagGems was enabled since ``enter``.

        Else some of them in turn, since to ask for one takes 35 microseconds.
        """
        if not self._note.changed and len(claims) > LOOKED_AT:
            claims = claims[self._turn :] + claims[: self._turn]
            self._turn = (self._turn + LOOKED_AT) % len(claims)
            claims = claims[:LOOKED_AT]
        for claim in claims:
            key, dispatch_key = claim.removeprefix("aten/").rsplit("/", 1)
            holder = registered_in(key, dispatch_key)
            if holder != __file__:
                self._note_held(key, holder)
                self._claims.add(claim)

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


def _can_override() -> bool:
    """Tell whether this torch (2.8 and newer) can put a Python kernel over another."""
    import torch

    return "allow_override" in inspect.signature(torch.library.Library.impl).parameters
