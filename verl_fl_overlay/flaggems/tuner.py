"""Makes the processes of a node use FlagGems' autotuner in turns; the others take what the first one found.

Each process has its own tuning database (``database``).  The processes share only the tiling chosen for a kernel and a
key: the process that timed the tilings leaves the choice in its ``Turn``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import wrapt

from verl_fl_overlay.flaggems.database import folder
from verl_fl_overlay.kernels import turns

Policy = Callable[..., tuple[Any, dict[Any, float]]]


def take_turns() -> None:
    """Make the tuners of the imported FlagGems take turns; do nothing if it has no tuners."""
    module = sys.modules.get("flag_gems.utils.libentry")  # a function has the same name
    tuner = getattr(module, "LibTuner", None)
    for kind in getattr(tuner, "_dispatch_table", {}).values():
        if not isinstance(vars(kind).get("policy"), wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(kind, "policy", _policy)


def _policy(wrapped: Policy, tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[Any, float]]:
    """Choose one of the configurations ``args[1]`` for the call whose arguments are ``args[2:]``."""
    time_one, configurations, given, named = args
    configurations = list(configurations)
    every = {**tuner.nargs, **named}
    key = tuner.get_key({name: value for name, value in every.items() if name in tuner.arg_names})
    with turns.first_in(folder(), f"tuning {tuner.config_table_name} for {key}") as turn:
        for configuration in configurations:
            if str(configuration) == turn.left:
                return configuration, {}
        best, times = wrapped(time_one, configurations, given, named)
        turn.left = str(best)
        return best, times
