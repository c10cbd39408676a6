"""Starts each kind of rollout server by verl's own code, and prints which of them have a variable that Ray lacks.

The servers only tell their environment; vLLM and SGLang are packages of empty classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ray
from ray.runtime_context import RuntimeContext

ROLLOUT = "verl.workers.rollout"
FORWARDED = "TEFL_LOG_LEVEL"


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of vLLM and SGLang, with a class for every name."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in ("vllm", "sglang"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "0.24.0"

        def named(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = named
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@dataclass
class Config:
    tensor_model_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    max_num_seqs: int = 1


class Server:
    def __init__(self, **options: Any) -> None:
        pass

    def variable(self) -> str | None:
        return os.environ.get(FORWARDED)

    def launch_server(self, **options: Any) -> None:
        pass

    def get_master_address(self) -> tuple[()]:
        return ()

    def get_server_address(self) -> tuple[str, int]:
        return "127.0.0.1", 1


class Worker:
    """A worker of verl: it only tells where it is."""

    class __ray_call__:  # noqa: N801
        @staticmethod
        async def remote(question: Any) -> Any:
            return question(None)


def replica(module: str, name: str) -> Any:
    """Return a replica as verl's constructor leaves it, with servers and workers of ours."""
    home = importlib.import_module(f"{ROLLOUT}.{module}")
    made = object.__new__(getattr(home, name))
    made.config, made.model_config, made.rollout_mode, made.replica_rank = Config(), None, None, 0
    made.world_size = made.nnodes = made.gpus_per_node = made.gpus_per_replica_node = 1
    made.is_reward_model = made.is_teacher_model = False
    made.name_suffix, made.servers = "", []
    made.workers = [Worker()]
    made.server_class = ray.remote(Server)
    if "SGLangHttpServer" in vars(home):
        home.SGLangHttpServer = made.server_class  # verl 0.7.0 has no attribute for it
    return made


def servers() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each kind of server, and a function that starts one."""
    node = ray.get_runtime_context().get_node_id()
    common = {"workers": [], "node_id": node, "cuda_visible_devices": "0", "tp": 1}

    def whole(module: str, name: str) -> Any:
        made = replica(module, name)
        with contextlib.suppress(ValueError):  # at the address of a server that serves nothing
            asyncio.run(made.launch_servers())
        return made.servers[0]

    def sglang_pd() -> Any:
        made = replica("sglang_rollout.sglang_pd_replica", "SGLangPDReplica")
        return asyncio.run(made._launch_one(role="prefill", bootstrap_port=1, actor_name="sglang_pd", **common))[0]

    def vllm_pd() -> Any:
        made = replica("vllm_rollout.vllm_pd_replica", "vLLMPDReplica")
        ports = {"side_channel_host": "", "side_channel_port": 1, "mooncake_bootstrap_port": 2}
        return made._spawn_pd_server(role="prefill", kv_transfer_config={}, actor_name="vllm_pd", **ports, **common)

    yield "sglang", lambda: whole("sglang_rollout.async_sglang_server", "SGLangReplica")
    yield "vllm", lambda: whole("vllm_rollout.vllm_async_server", "vLLMReplica")
    yield "sglang, prefill and decode", sglang_pd
    yield "vllm, prefill and decode", vllm_pd


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False)
    os.environ[FORWARDED] = "WARNING"  # after Ray was started, whose workers have the environment of then
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    RuntimeContext.get_accelerator_ids = lambda self: {"GPU": ["0"], "NPU": ["0"]}
    sys.meta_path.insert(0, Empty())
    version = metadata.version
    metadata.version = lambda name: "0.24.0" if name in ("vllm", "sglang") else version(name)
    import verl  # noqa: F401

    told = {}
    for kind, start in servers():
        with contextlib.suppress(ModuleNotFoundError):  # a kind that this release lacks
            told[kind] = ray.get(start().variable.remote(), timeout=120)
    print("TOLD " + json.dumps(told))


if __name__ == "__main__":
    main()
