"""FlagGems' operators that are in torch's place because somebody else enabled FlagGems, and what they do to training.

The dispatcher is asked which kernels it would call, and FlagGems which operators it has: nobody has to tell the overlay
that, or when, FlagGems was enabled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Any

from verl_fl_overlay.flaggems import library, registrar, routing, safety
from verl_fl_overlay.flaggems.dispatcher import part_of_torch, registered_in
from verl_fl_overlay.flaggems.library import FlagGems

ENABLERS = ("verl_hardware_plugin", "vllm_fl", "sglang_fl", "transformer_engine.plugin")
"""Packages that enable FlagGems when they are asked to."""

_HOME = os.path.join("flag_gems", "__init__.py")
"""Where ``enable`` has its library; what a vendor's part registers when FlagGems is imported lies elsewhere."""

SHOWN = 20


class Others:
    """What FlagGems' kernels of others hold: looks again only when torch's or FlagGems' notes have changed."""

    def __init__(self, allowed: Collection[str]) -> None:
        """Count the aten keys in ``allowed`` as harmless; VERL_FL_UNSAFE_OPS names them."""
        self._allowed = frozenset(key.removeprefix("aten::").removeprefix("aten.") for key in allowed)
        self._gems: FlagGems | None = None
        self._noted: dict[bool, object] = {}
        self._registered: set[str] = set()  # by FlagGems' registrars of others, in whatever library
        self.held: dict[str, str] = {}
        """Aten key -> the file that registered FlagGems' kernel which holds it."""
        self.harmful: dict[str, str] = {}
        """Those of ``held`` that cut or falsify a gradient -> why."""

    def look(self, training: bool) -> bool:
        """Look what is held now, inside (``training``) or outside the phase; return whether that has changed.

        Raises:
            FlagGemsError: somebody enabled a FlagGems that does not tell what it has.
        """
        module = sys.modules.get("flag_gems")
        if module is None:
            return False
        import torch

        claims = torch.library._impls
        current: Any = getattr(module, registrar.NAME, None)
        noted = id(current), frozenset(claims)
        if self._noted.get(training) == noted:
            return False
        self._noted[training] = noted
        before = self.held
        try:
            self._gems = self._gems or library.load()
        except library.FlagGemsError:
            if current is None:
                return False  # it was imported, and not enabled
            raise
        if current is not None and type(current).__module__ != library.__name__:  # not the overlay's own
            self._registered.update(current.get_all_keys())
        self.held = {
            kernel.key: file
            for kernel in self._gems.kernels
            for dispatch_key in kernel.dispatch_keys
            if (file := registered_in(kernel.key, dispatch_key)).endswith(_HOME)
            or (kernel.key in self._registered and f"aten/{kernel.key}/{dispatch_key}" in claims and _foreign(file))
        }
        self.harmful = {
            kernel.key: why
            for kernel in self._gems.kernels
            if kernel.key in self.held and kernel.key not in self._allowed and (why := safety.why_unsafe(kernel))
        }
        return self.held != before

    def __str__(self) -> str:
        by = [name for name in ENABLERS if name in sys.modules]
        text = (
            f"FlagGems is enabled by somebody else ({', '.join(by) or 'a call of flag_gems.enable or only_enable'}): "
            f"{len(self.held)} operators are FlagGems' in training and between, whatever the overlay's lists say"
        )
        if not self.harmful:
            return f"{text}; none of them is known to cut or falsify a gradient"
        named = list(self.harmful)
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        return (
            f"{text}; {len(named)} of them cut or falsify gradients: {', '.join(named[:SHOWN])}{more}. Let the overlay "
            "alone enable FlagGems in training (VERL_ENGINE_VENDOR not flagos, no flag_gems.enable() in this process), "
            "or name these operators in the list of whoever enables it"
        )


def _foreign(file: str) -> bool:
    return file != routing.__file__ and not part_of_torch(file)
