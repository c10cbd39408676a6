"""What verl makes of the recipes' command lines; prints JSON:  python tests/contract/composed.py COMMANDS

COMMANDS is JSON, recipe -> the arguments behind ``python``.  Each goes through verl's own hydra entry, which refuses a
key that is unknown; then verl's checks of the whole configuration run, and its dataclasses are made from the parts.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from typing import Any


def composed(arguments: list[str]) -> Any:
    """Return the configuration that the module behind the last ``-m`` would get."""
    from omegaconf import OmegaConf

    start = len(arguments) - arguments[::-1].index("-m")
    sys.argv = [*arguments[start:], "--cfg", "job", "--resolve"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        runpy.run_module(arguments[start], run_name="__main__", alter_sys=False)
    _, key, rest = re.split(r"^(\w+:\n)", told.getvalue(), maxsplit=1, flags=re.MULTILINE)  # what imports say is before
    return OmegaConf.create(key + rest)


def main() -> None:
    import verl  # noqa: F401
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    found: dict[str, list[str]] = {}
    for recipe, arguments in json.loads(sys.argv[1]).items():
        config = composed(arguments)
        parts = [config.model, config.engine, config.optim] if "engine" in config else []
        if "actor_rollout_ref" in config:
            validate_config(config=config, use_reference_policy=True, use_critic=False)
            parts = [config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout]
        found[recipe] = [type(omega_conf_to_dataclass(part)).__name__ for part in parts]
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
