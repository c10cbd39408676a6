"""A stand-in for ``transformer_engine.plugin.core`` of TransformerEngine-FL: its interface as far as the overlay goes.

``tests/unit/test_te_fl.py`` asks it and, where it is installed, the real one the same questions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any


class BackendImplKind(str, Enum):
    DEFAULT = "flagos"
    REFERENCE = "reference"
    VENDOR = "vendor"


@dataclass(frozen=True)
class OpImpl:
    op_name: str
    impl_id: str
    kind: BackendImplKind
    fn: Callable[..., Any]
    vendor: str | None = None

    def is_meant_by(self, token: str) -> bool:
        return token in (self.kind.value, f"impl:{self.impl_id}", f"vendor:{self.vendor}")


@dataclass(frozen=True)
class Policy:
    prefer: str
    strict: bool
    per_op_order: tuple[tuple[str, tuple[str, ...]], ...]
    deny_vendors: frozenset[str]
    allow_vendors: frozenset[str] | None

    def order(self, op: str) -> tuple[str, ...]:
        others = tuple(kind for kind in ("flagos", "vendor", "reference") if kind != self.prefer)
        if self.prefer == "reference":
            others = ("flagos", "vendor")
        return dict(self.per_op_order).get(op, (self.prefer, *others))

    def admits(self, vendor: str | None) -> bool:
        allowed = self.allow_vendors is None or vendor in self.allow_vendors
        return vendor is None or (allowed and vendor not in self.deny_vendors)


def _words(name: str, separator: str = ",") -> list[str]:
    return [word.strip() for word in os.environ.get(name, "").split(separator) if word.strip()]


def policy_from_env() -> Policy:
    older = "vendor" if os.environ.get("TE_FL_PREFER_VENDOR") == "1" else "flagos"
    orders = [part.split("=", 1) for part in _words("TE_FL_PER_OP", ";") if "=" in part]
    return Policy(
        prefer=os.environ.get("TE_FL_PREFER", "").lower() or older,
        strict=os.environ.get("TE_FL_STRICT") == "1",
        per_op_order=tuple(sorted((op.strip(), tuple(tokens.split("|"))) for op, tokens in orders)),
        deny_vendors=frozenset(_words("TE_FL_DENY_VENDORS")),
        allow_vendors=frozenset(_words("TE_FL_ALLOW_VENDORS")) or None,
    )


_policy: Policy | None = None


def get_policy() -> Policy:
    global _policy
    _policy = _policy or policy_from_env()
    return _policy


def reset_global_policy() -> None:
    global _policy
    _policy = None


class Registry:
    def __init__(self) -> None:
        self._held: dict[str, list[OpImpl]] = {}

    def register_many(self, implementations: Iterable[OpImpl]) -> None:
        for implementation in implementations:
            self._held.setdefault(implementation.op_name, []).append(implementation)

    def snapshot(self) -> SimpleNamespace:
        return SimpleNamespace(impls_by_op=dict(self._held))


class Manager:
    def __init__(self) -> None:
        self.registry = Registry()

    def ensure_initialized(self) -> None: ...

    def call(self, op: str) -> Any:
        policy = get_policy()
        admitted = [i for i in self.registry.snapshot().impls_by_op[op] if policy.admits(i.vendor)]
        candidates = [i for token in policy.order(op) for i in admitted if i.is_meant_by(token)]
        if not candidates:
            raise RuntimeError(f"no implementation of {op}")
        for candidate in candidates[:-1]:
            try:
                return candidate.fn()
            except Exception:
                if os.environ.get("TE_FL_STRICT", "1") == "0":
                    raise
        return candidates[-1].fn()


_manager = Manager()


def get_default_manager() -> Manager:
    return _manager
