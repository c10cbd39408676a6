"""Which collectives verl asks torch for: the backend's name, and the string a process group is initialised with."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.hooks import Call, Hook, Wrapper

SOURCE = "https://github.com/volcengine/verl/blob"
FLAGCX = "https://github.com/flagos-ai/FlagCX/blob/0c721293a79348323afc874d7067b4fce0b06643"


NATIVE_ONLY = {
    "nccl": "NCCL (HCCL on Ascend)",
    "delta_sharded": "NCCL",
    "kimi_ckpt_engine": "vLLM's own communicator",
}
"""Checkpoint engine of verl that bypasses torch's backends -> the library that it communicates through."""


def _group(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        args = (events.group_backend.ask(args[0]) or args[0], *args[1:])
    elif "backend" in kwargs:
        kwargs = {**kwargs, "backend": events.group_backend.ask(kwargs["backend"]) or kwargs["backend"]}
    return wrapped(*args, **kwargs)


def cpu_hook() -> Hook:
    """Return the hook that training on a CPU needs."""
    return Hook(
        name="cpu.process_group",
        module="torch.distributed",
        attribute="init_process_group",
        wrapper=_group,
        feature="cpu",
        required=True,
        why="verl asks for 'cpu:gloo,<device>:<backend>'; on a CPU that repeats a pair, which torch refuses.",
        upstream=f"{SOURCE}/v0.9.1/verl/utils/distributed.py#L62",
        until="verl leaves out the second pair where the device is the CPU",
    )


def _backend_name(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return events.flagcx_backend.ask() or str(wrapped(*args, **kwargs))


def _checkpoint_engine(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    engine = args[0] if args else kwargs["backend"]
    if engine in NATIVE_ONLY:
        events.past_torch.ask(
            f"checkpoint engine {engine!r}",
            NATIVE_ONLY[engine],
            "Take another one (actor_rollout_ref.rollout.checkpoint_engine.backend=naive, nixl or mooncake), or leave "
            "this check out with "
            "VERL_FL_DISABLE=flagcx.checkpoint_engine,flagcx.checkpoint_engine_class,flagcx.stateless_group",
        )
    return wrapped(*args, **kwargs)


GUARDS = {
    "memory": "gives back the memory of an asynchronous collective's tensors while it runs, so that other numbers "
    "travel; the allocator is told to keep it until then.",
    "contiguous": "sends the memory behind a tensor that is not contiguous, and says nothing; NCCL refuses it, and so "
    "do we.",
    "sizes": "writes behind an output that is too small for its input; NCCL refuses what does not fit, and so do we.",
    "barrier": "ends a barrier while this rank's kernels are still queued; NCCL waits for them, and so do we.",
    "reductions": "says 'Unhandled ReduceOp' for PREMUL_SUM; we say what it has and what to do.",
    "timeout": "ignores every timeout, so that a rank that fails leaves the others waiting without end; it is told.",
}
"""What FlagCX does without a word, or with a bare one: guard -> why, beginning after 'FlagCX'."""


def _guard(name: str) -> Wrapper:
    def guarded(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = wrapped(*args, **kwargs)
        events.group_guard.ask(name)
        return made

    return guarded


def _stateless_group(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    events.past_torch.ask(
        "stateless_init_process_group",
        "NCCL (HCCL on Ascend)",
        "Take torch's groups, unset USE_FLAGCX, or leave this check out with VERL_FL_DISABLE=flagcx.stateless_group",
    )
    return wrapped(*args, **kwargs)


def flagcx_hooks() -> list[Hook]:
    """Return what every release needs."""
    return [
        Hook(
            name="flagcx.process_group",
            module="torch.distributed",
            attribute="init_process_group",
            wrapper=_group,
            feature="flagcx",
            required=True,
            why="Nothing in verl imports FlagCX's torch plugin, and some trainers ask for its backend alone, which "
            "serves no CPU tensors; it is imported first, and gloo is put beside it.",
            upstream=f"{SOURCE}/v0.9.0/verl/utils/distributed.py#L62",
            until="verl imports flagcx where its platform asks for it, and gives both backends everywhere",
        ),
        *(
            Hook(
                name=f"flagcx.{name}",
                module="torch.distributed",
                attribute="init_process_group",
                wrapper=_guard(name),
                feature="flagcx",
                required=True,
                why=f"FlagCX {why}",
                upstream=f"{FLAGCX}/plugin/torch/flagcx/src/backend_flagcx.cpp",
                until="FlagCX does as NCCL does",
            )
            for name, why in GUARDS.items()
        ),
    ]


def backend_name_hook() -> Hook:
    """Return what the releases without a platform layer (0.7, 0.8) also need."""
    return Hook(
        name="flagcx.backend",
        module="verl.utils.device",
        attribute="get_nccl_backend",
        wrapper=_backend_name,
        feature="flagcx",
        required=True,
        why="verl says nccl (hccl on an NPU) whatever USE_FLAGCX is; with it on, flagcx is said.",
        upstream=f"{SOURCE}/v0.8.0/verl/utils/device.py#L116",
        until="verl 0.9.0, whose platforms read USE_FLAGCX",
    )


def checkpoint_engine_hooks() -> list[Hook]:
    """Return what the releases with checkpoint engines and groups of their own (0.7.1 on) also need."""
    engines = [
        Hook(
            name=name,
            module="verl.checkpoint_engine.base",
            attribute=f"CheckpointEngineRegistry.{method}",
            wrapper=_checkpoint_engine,
            feature="flagcx",
            required=False,
            why="Some checkpoint engines use NCCL past torch's backends; with USE_FLAGCX on they are refused.",
            upstream=f"{SOURCE}/v0.9.1/verl/checkpoint_engine/nccl_checkpoint_engine.py#L298",
            until="verl's checkpoint engines communicate through the platform's backend",
        )
        for name, method in (("flagcx.checkpoint_engine", "new"), ("flagcx.checkpoint_engine_class", "get"))
    ]
    groups = Hook(
        name="flagcx.stateless_group",
        module="verl.utils.distributed",
        attribute="stateless_init_process_group",
        wrapper=_stateless_group,
        feature="flagcx",
        required=False,
        why="Groups outside torch.distributed are vLLM's communicators (NCCL, or HCCL on Ascend); with USE_FLAGCX on "
        "they are refused.",
        upstream=f"{SOURCE}/v0.9.1/verl/utils/distributed.py#L125",
        until="verl's stateless groups communicate through the platform's backend",
    )
    return [*engines, groups]
