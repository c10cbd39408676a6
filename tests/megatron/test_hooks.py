"""Megatron without a GPU: verl's real modules import with megatron-core, and the hooks sit on the real classes."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from processes import OVERLAY, output

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

ENGINE = "verl.workers.engine.megatron.transformer_impl"
LEGACY = ["verl.workers.actor.megatron_actor", "verl.workers.critic.megatron_critic", "verl.workers.megatron_workers"]

LOOK = """
import importlib, json, sys
import verl
for module in {modules}: importlib.import_module(module)
import wrapt
from verl_fl_overlay import activation
def wrapped(hook):
    found = sys.modules[hook.module]
    for name in hook.attribute.split("."):
        found = found.__dict__[name]
    return isinstance(found, wrapt.FunctionWrapper)
hooks = [s.hook for s in activation.active().hooks.report() if s.hook.needs == "megatron.core"]
hooks = [hook for hook in hooks if hook.module in {modules}]
from {engine} import MegatronEngine, MegatronEngineWithLMHead, MegatronEngineWithValueHead
from verl.workers.engine.base import EngineRegistry
print(json.dumps({{
    "wrapped": {{h.name: wrapped(h) for h in hooks}},
    "inherited": [c.initialize is not None and "initialize" not in vars(c)
                  for c in (MegatronEngineWithLMHead, MegatronEngineWithValueHead)],
    "classes": [EngineRegistry.get_engine_cls(model_type=t, backend="megatron").__name__
                for t in ("language_model", "value_model")],
}}))
"""


def needs_megatron():
    pytest.importorskip("megatron.core", reason="needs megatron-core: pip install 'megatron-core>=0.16,<0.17'")
    pytest.importorskip("mbridge", reason="needs mbridge: pip install mbridge")


def environment():
    from sft import without_images

    return {**OVERLAY, **without_images(), "VERL_FL_STRICT": "1"}


def test_hooks_sit_on_the_real_classes():
    needs_megatron()
    modules = [ENGINE, *(LEGACY if version("verl") < "0.8" else [])]
    found = json.loads(output(LOOK.format(modules=modules, engine=ENGINE), env=environment()))
    steps = ["engine.initialize.megatron"]
    if version("verl") < "0.8":
        steps += [
            "legacy.megatron_actor.update_policy",
            "legacy.megatron_actor.compute_log_prob",
            "legacy.megatron_critic.update_critic",
            "legacy.megatron_critic.compute_values",
            "legacy.megatron.build_model_optimizer",
            "legacy.megatron.build_critic_model_optimizer",
        ]
    assert found["wrapped"] == dict.fromkeys(steps, True)
    assert found["inherited"] == [True, True], "both heads take the hooked initialize"
    assert found["classes"] == ["MegatronEngineWithLMHead", "MegatronEngineWithValueHead"]
