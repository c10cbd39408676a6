"""The environment in which vLLM runs on a CPU; its processes find the modules of these tests."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ON_CPU = {
    "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1] / "examples"))),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as in verl's server
    "VLLM_NO_USAGE_STATS": "1",
}
