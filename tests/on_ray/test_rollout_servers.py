"""Every kind of rollout server gets the stack's variables where Ray was started before verl was imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run

pytest.importorskip("torch")
pytest.importorskip("ray")
verl = pytest.importorskip("verl")

LOADED = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}
KINDS = {
    "0.7.0": ["sglang"],  # its vLLM works in the process of the trainer's worker
    "0.7.1": ["sglang", "vllm"],
    "0.8.0": ["sglang", "vllm", "sglang, prefill and decode"],
}
ALL = ["sglang", "vllm", "sglang, prefill and decode", "vllm, prefill and decode"]


@pytest.mark.parametrize(("disabled", "expected"), [("", "WARNING"), ("ray.actor_options", None)])
def test_servers_get_what_the_job_lacks(disabled, expected):
    environment = {**LOADED, "VERL_FL_DISABLE": disabled, "RAY_USAGE_STATS_ENABLED": "0", "VERL_PLATFORM": "nvidia"}
    done = run(Path(__file__).parent / "rollout_servers.py", env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])
    kinds = KINDS.get(verl.__version__, ALL)
    assert {kind: told[kind] for kind in kinds} == dict.fromkeys(kinds, expected)
