"""Checks the names in a user's list against the installed FlagGems, and explains those that it does not have."""

from __future__ import annotations

from collections.abc import Iterable

from verl_fl_overlay.errors import SettingsError, nearest
from verl_fl_overlay.flaggems.library import FlagGems

ALIASES = {
    "rmsnorm": ("rms_norm",),
    "layernorm": ("layer_norm", "native_layer_norm"),
    "layer_norm": ("native_layer_norm",),
    "native_layer_norm": ("layer_norm",),
    "groupnorm": ("group_norm",),
    "batchnorm": ("batch_norm",),
    "logsoftmax": ("log_softmax",),
    "flash_attention": ("flash_attention_forward", "_flash_attention_forward"),
    "flash_attention_forward": ("_flash_attention_forward",),
    "matmul": ("mm", "bmm"),
    "div": ("true_divide", "true_divide_tensor"),
    "pow": ("pow_tensor_scalar", "pow_tensor_tensor", "pow_scalar"),
    "where": ("where_self",),
}
"""A name that people and documents use -> what FlagGems calls it, depending on its version."""

NOT_ROUTED = {
    "where_scalar_other": "it is gone since FlagGems 5.0; where_self is what is left of it",
    "where_scalar_self": "it is gone since FlagGems 5.0; where_self is what is left of it",
    "silu_and_mul": "it is a fused function that models call, no aten operator to route",
    "gelu_and_mul": "it is a fused function that models call, no aten operator to route",
    "cross_entropy_loss": "it is a fused function that models call, no aten operator to route",
    "rotary_embedding": "it is a fused function that models call, no aten operator to route",
    "fused_moe": "it is a fused function that models call, no aten operator to route",
}
"""A name that looks like an operator that can be routed, but is none -> the reason."""


def check(names: Iterable[str], variable: str, gems: FlagGems) -> None:
    """Raise if ``names`` (from ``variable``) holds one that is no function of the installed FlagGems.

    Raises:
        SettingsError: lists every such name, each with what is known about it or the nearest real names.
    """
    unknown = unknown_in(names, gems)
    if unknown:
        raise SettingsError(
            f"{variable} names operators that FlagGems {gems.version} does not offer here:\n"
            + "\n".join(f"  {line}" for line in unknown)
            + f"\n  A name is that of a FlagGems function; `verl-fl ops` lists all {len(gems.names)}."
        )


def unknown_in(names: Iterable[str], gems: FlagGems) -> list[str]:
    """Return those of ``names`` that are no function of the installed FlagGems, each with what is known about it."""
    known = set(gems.names)
    return [f"{name!r}: {_explain(name, gems)}" for name in names if name not in known]


def check_keys(keys: Iterable[str], variable: str, gems: FlagGems) -> tuple[str, ...]:
    """Return ``keys`` (from ``variable``) as aten keys, without the "aten::" or "aten." that may stand before them.

    Raises:
        SettingsError: one is no aten key that the installed FlagGems has a kernel for.
    """
    wanted = tuple(key.removeprefix("aten::").removeprefix("aten.") for key in keys)
    known = {kernel.key for kernel in gems.kernels}
    unknown = [key for key in wanted if key not in known]
    if unknown:
        lines = []
        for key in unknown:
            own = [kernel.key for kernel in gems.kernels if kernel.name == key]
            said = f"it is a function; its aten keys are {', '.join(own)}" if own else _near(key, known)
            lines.append(f"  {key!r}: {said}")
        raise SettingsError(
            f"{variable} names aten keys that FlagGems {gems.version} does not offer here:\n" + "\n".join(lines)
        )
    return wanted


def _explain(name: str, gems: FlagGems) -> str:
    if name in gems.not_here:
        return f"FlagGems has it, but leaves it out for {gems.vendor} or for this torch"
    if name in NOT_ROUTED:
        return NOT_ROUTED[name]
    known = set(gems.names)
    alias = [other for other in ALIASES.get(name, ()) if other in known]
    if alias:
        return f"FlagGems calls it {' or '.join(alias)}"
    key = name.removeprefix("aten::").removeprefix("aten.")
    functions = sorted({kernel.name for kernel in gems.kernels if kernel.key == key})
    if functions:
        return f"this is an aten key; its function is {', '.join(functions)}"
    return _near(name, known)


def _near(name: str, known: Iterable[str]) -> str:
    return nearest(name, known, 3, "did you mean {}?") or "there is nothing like it"
