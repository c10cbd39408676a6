"""Hooked functions that a task of a real Ray uses or is given, in workers with the overlay and without."""

from __future__ import annotations

import json

import pytest
from processes import OVERLAY, PLAIN, output

pytest.importorskip("ray")
pytest.importorskip("verl")

CODE = """
import json
import ray
import verl
from ray import init
from torch.distributed import init_process_group
from verl.workers.engine.fsdp.transformer_impl import logprobs_from_logits

THINGS = {"init": init, "init_process_group": init_process_group, "logprobs_from_logits": logprobs_from_logits}


def kinds(things):
    return {name: type(thing).__name__ for name, thing in things.items()}


@ray.remote(num_cpus=0)
def uses():
    return kinds({"init": init, "init_process_group": init_process_group, "logprobs_from_logits": logprobs_from_logits})


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self):
        import verl

    def kinds(self, things):
        return kinds(things)


init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
with_overlay = Worker.remote()
without = Worker.options(runtime_env={"env_vars": {"VERL_USE_EXTERNAL_MODULES": "", **%s}}).remote()
found = {
    "here": kinds(THINGS),
    "with": ray.get(with_overlay.kinds.remote(THINGS)),
    "without": ray.get(without.kinds.remote(THINGS)),
    "uses": ray.get(uses.remote()),
}
print(json.dumps(found))
"""


def test_a_task_gets_what_its_own_process_has(tmp_path):
    env = {**OVERLAY, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    found = json.loads(output(CODE % json.dumps(PLAIN), env=env, cwd=tmp_path, timeout=300))
    names = ("init", "init_process_group", "logprobs_from_logits")
    assert found["here"] == found["with"] == dict.fromkeys(names, "_Wrapper")
    assert found["without"] == dict.fromkeys(names, "function")
    assert set(found["uses"]) == set(names), "by their names in the task's module"
