"""``tests/gpu/megatron_engine.py`` on a CPU: verl's real Megatron engine, with torch.cuda answering for the CPU.

megatron-core asks torch.cuda for its device, streams and random numbers' state whatever the machine, and puts a few
tensors on "cuda" by name.  Here those questions get the CPU's answers; every layer, optimizer and schedule is the real
one.  It shows what the hooks do around Megatron; nothing about Megatron on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import megatron_engine
import torch
from torch.overrides import TorchFunctionMode


class Stream:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)  # a CPU has one

    def wait_stream(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> Stream:
        return self


def answer_for_cuda() -> None:
    """Answer what megatron-core asks torch.cuda."""
    import torch.cuda.random

    answers = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "Stream": Stream,
        "current_stream": lambda *args: Stream(),
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda *args, **kwargs: None,
        "get_device_capability": lambda *args: (9, 0),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.random.set_rng_state = answers["set_rng_state"]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args: self
    torch.cuda.FloatTensor, torch.cuda.IntTensor = torch.FloatTensor, torch.IntTensor
    import megatron.core.tensor_parallel.random

    megatron.core.tensor_parallel.random._set_cuda_rng_state = lambda *args, **kwargs: None
    from megatron.core.transformer.moe import token_dispatcher

    # Megatron makes numpy's arrays of what it takes from the GPU, as torch's all_to_all_single asks for
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


class CpuForCuda(TorchFunctionMode):
    """Makes tensors on the CPU that were asked for on "cuda", and names their type as Megatron checks it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg for arg in args)
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


if __name__ == "__main__":
    answer_for_cuda()
    with CpuForCuda():
        megatron_engine.main()
