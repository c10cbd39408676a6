"""FlagGems' own note of what it has registered, ``flag_gems.current_work_registrar``, while the overlay registers.

Kernels of some vendors read the note when they run.  Cambricon's look up torch's own ``copy_`` in its ``torch_ops_map``
to save and restore a tensor while they tune; those of other vendors ask whether it is there, and then do not call the
operator that they replace.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from verl_fl_overlay.flaggems.library import Kernel

NAME = "current_work_registrar"


class RegistrarNote:
    """Names FlagGems' ``registrar`` as its current one between ``write`` and ``take_back``.

    A registrar of somebody else who enabled FlagGems stays the current one, and learns what its kernels will ask for.
    """

    def __init__(self, registrar: Any) -> None:
        self._registrar = registrar
        self._current: Any = None
        self._before: dict[str, Any] | None = None

    @property
    def changed(self) -> bool:
        """Whether somebody else has enabled FlagGems since ``write``, or ended a use of it."""
        return getattr(sys.modules.get("flag_gems"), NAME, None) is not self._current

    def write(self, kernels: Sequence[Kernel]) -> None:
        """Note that ``kernels`` are routed; call this before they are registered."""
        module = sys.modules.get("flag_gems")
        self._current = current = getattr(module, NAME, None)
        if module is None or self._registrar is None:
            return
        if hasattr(self._registrar, "torch_ops_map"):
            _fill(self._registrar.torch_ops_map, kernels)
            if current is not None:
                current.torch_ops_map = {**self._registrar.torch_ops_map, **getattr(current, "torch_ops_map", {})}
        if current is None:
            self._registrar.all_ops[:] = [kernel.name for kernel in kernels]
            self._registrar.all_keys[:] = [kernel.key for kernel in kernels]
            self._before = {NAME: vars(module)[NAME]} if NAME in vars(module) else {}
            self._current = self._registrar
            setattr(module, NAME, self._registrar)

    def take_back(self) -> None:
        """Restore what was noted before, unless somebody else has enabled FlagGems meanwhile."""
        before, self._before = self._before, None
        module = sys.modules.get("flag_gems")
        if before is None or module is None:
            return
        if vars(module).get(NAME) is self._registrar:
            del vars(module)[NAME]  # ``use_gems`` deletes it, so it may have been missing
            vars(module).update(before)


def _fill(natives: dict[str, Any], kernels: Sequence[Kernel]) -> None:
    """Put torch's kernels of these operators into ``natives``, unless they are there; a torch without them has none."""
    import torch

    for kernel in kernels:
        name = f"aten::{kernel.key}"
        if name not in natives and hasattr(torch.library, "get_kernel"):
            try:
                natives[name] = torch.library.get_kernel(name, kernel.dispatch_keys[0])
            except Exception:  # as FlagGems itself does: there is none for this chip
                continue
