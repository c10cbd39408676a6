"""What the installed verl offers to train with, and whether the hooks sit on those very classes; prints JSON.

Offered is what a decorator of verl's registers, read from its source, so that an engine whose package is missing here
is told from one that the release lacks; and the legacy workers' classes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import verl
import wrapt

HEADS = {"language_model": "lm", "value_model": "value"}
ENGINE = ("initialize", "train_batch", "infer_batch")
ACTOR, CRITIC = ("update_policy", "compute_log_prob"), ("update_critic", "compute_values")
LEGACY = {
    "legacy fsdp lm": ("actor.dp_actor", "DataParallelPPOActor", ACTOR),
    "legacy fsdp value": ("critic.dp_critic", "DataParallelPPOCritic", CRITIC),
    "legacy megatron lm": ("actor.megatron_actor", "MegatronPPOActor", ACTOR),
    "legacy megatron value": ("critic.megatron_critic", "MegatronPPOCritic", CRITIC),
}
WORKERS = Path(verl.__file__).parent / "workers"


def offered() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Yield row, module below verl.workers, class and the methods that verl calls to train with it."""
    for file in sorted((WORKERS / "engine").rglob("*.py")):
        module = ".".join(file.relative_to(WORKERS).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "EngineRegistry.register":
                    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                    # MindSpeed registers as "megatron" too, for the NPU.
                    backends = ["mindspeed"] if "mindspeed" in module else given["backend"]
                    for backend in [backends] if isinstance(backends, str) else backends:
                        yield f"{backend} {HEADS[given['model_type']]}", module, node.name, ENGINE
    for row, (module, name, methods) in LEGACY.items():
        if (WORKERS / f"{module.replace('.', '/')}.py").exists():
            yield row, module, name, methods


def state(module: str, name: str, methods: tuple[str, ...]) -> dict[str, Any]:
    """Return which methods of the real class go through a hook, or the package without which it is not here."""
    try:
        cls = getattr(importlib.import_module(f"verl.workers.{module}"), name)
    except ImportError as error:
        return {"needs": (error.name or str(error)).split(".")[0]}
    return {method: isinstance(inspect.getattr_static(cls, method), wrapt.FunctionWrapper) for method in methods}


if __name__ == "__main__":
    print("RESULT " + json.dumps({row: state(*of_class) for row, *of_class in offered()}))
