"""What each release needs to train on a machine without an accelerator (VERL_FL_DEVICE=cpu)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from verl_fl_overlay.compat import engines, process_group
from verl_fl_overlay.devices import cpu_module
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.hooks import Hook

SOURCE = "https://github.com/volcengine/verl/blob"

Call = Callable[..., Any]


def _engine_class(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = engines.class_for_cuda(instance, "cpu", *args, **kwargs)
    return wrapped(*args, **kwargs) if found is None else found


def _backend(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return "gloo"


def _device_module(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cpu_module


def _platform_name(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return "cpu"


def _platform_class(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(*args, **kwargs) or (_cpu_platform() if args == ("cpu",) else None)


@functools.cache
def _cpu_platform() -> type[Any]:
    """Build the platform class; only here, because its base is verl's."""
    from contextlib import nullcontext

    from verl.plugin.platform.platform_base import PlatformBase

    class PlatformCpu(PlatformBase):  # type: ignore[misc]
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = cpu_module

        def is_available(self) -> bool:
            return True

        def current_device(self) -> Any:
            return cpu_module.current_device()

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            pass

        def synchronize(self, device_index: int | None = None) -> None:
            pass

        def manual_seed(self, seed: int) -> None:
            cpu_module.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            cpu_module.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
            return cpu_module.get_device_capability()

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its workers; there is none for CPUs

        def nvtx_range(self, msg: str) -> Any:
            return nullcontext()

        def profiler_start(self) -> None:
            pass

        def profiler_stop(self) -> None:
            pass

        def ray_resource_name(self) -> str:
            return "CPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
            return {"num_cpus": num_gpus}

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> Any:
            return None

    return PlatformCpu


def _enough_cpus(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    import ray

    free = ray.available_resources().get("CPU", 0)
    needed = instance.get_n_gpus()
    if free < needed:
        raise OverlayError(
            f"the training workers need {needed} CPUs of the Ray cluster, one each, and {free:g} are free; a placement "
            "group would wait for ever. Lower trainer.n_gpus_per_node or trainer.nnodes, or raise "
            "ray_kwargs.ray_init.num_cpus."
        )


def _accept_cpu_states(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _not_pinned(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(pin_memory=False)


def shared_hooks() -> list[Hook]:
    """Return what every release needs."""
    return [
        Hook(
            name="cpu.engine_class",
            module="verl.workers.engine.base",
            attribute="EngineRegistry.get_engine_cls",
            wrapper=_engine_class,
            feature="cpu",
            required=True,
            why="verl registers its engines for cuda and npu only; the CPU gets the class that serves cuda.",
            upstream=f"{SOURCE}/v0.9.1/verl/workers/engine/base.py#L400",
            until="verl registers its FSDP engines for cpu",
            relies_on=(
                "verl.workers.engine.base:EngineRegistry._engines",
                "verl.workers.engine.base:EngineRegistry.register",
            ),
        ),
        process_group.cpu_hook(),
        Hook(
            name="cpu.fsdp1_sync",
            module="torch.distributed.fsdp._init_utils",
            attribute="_check_module_states_for_sync_module_states",
            wrapper=_accept_cpu_states,
            feature="cpu",
            required=False,
            why="FSDP1 refuses to broadcast CPU parameters, which gloo can do; its check is skipped.",
            upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/fsdp/_init_utils.py",
            until="torch allows sync_module_states with CPU parameters",
        ),
        Hook(
            name="cpu.offload_policy",
            module="torch.distributed.fsdp._fully_shard._fsdp_api",
            attribute="CPUOffloadPolicy.__init__",
            wrapper=_not_pinned,
            feature="cpu",
            required=False,
            why="verl offloads reference models to pinned memory, which torch refuses where there is no accelerator.",
            upstream=f"{SOURCE}/v0.7.1/verl/workers/fsdp_workers.py#L620",
            until="torch ignores pin_memory where there is no accelerator",
        ),
    ]


def device_helper_hooks() -> list[Hook]:
    """Return what the releases without a platform layer (0.7, 0.8) need."""
    return [
        Hook(
            name="cpu.backend",
            module="verl.utils.device",
            attribute="get_nccl_backend",
            wrapper=_backend,
            feature="cpu",
            required=True,
            why="verl says nccl on every machine that has no NPU; a CPU communicates through gloo.",
            upstream=f"{SOURCE}/v0.8.0/verl/utils/device.py#L116",
            until="verl 0.9.0, which asks its platform",
        ),
        Hook(
            name="cpu.device_module",
            module="verl.utils.device",
            attribute="get_torch_device",
            wrapper=_device_module,
            feature="cpu",
            required=True,
            why="verl reads memory figures from torch.<device>; torch.cpu lacks them, the overlay's module has them.",
            upstream=f"{SOURCE}/v0.8.0/verl/utils/device.py#L88",
            until="verl 0.9.0, which asks its platform",
        ),
    ]


def platform_hooks() -> list[Hook]:
    """Return what the releases with a platform layer (0.9 on) need."""
    module = "verl.plugin.platform.platform_manager"
    return [
        Hook(
            name="cpu.platform_name",
            module=module,
            attribute="_detect_platform_name",
            wrapper=_platform_name,
            feature="cpu",
            required=True,
            why="verl falls back to 'nvidia' where it finds no accelerator; the overlay names the CPU.",
            upstream=f"{SOURCE}/v0.9.1/verl/plugin/platform/platform_manager.py",
            until="verl has a platform for the CPU",
        ),
        Hook(
            name="cpu.platform_class",
            module=module,
            attribute="PlatformRegistry.get",
            wrapper=_platform_class,
            feature="cpu",
            required=True,
            why="verl has platforms for cuda, npu and rocm; the overlay's CPU platform is given for 'cpu'.",
            upstream=f"{SOURCE}/v0.9.1/verl/plugin/platform/platform_manager.py",
            until="verl has a platform for the CPU",
            relies_on=("verl.plugin.platform.platform_base:PlatformBase",),
        ),
        Hook(
            name="cpu.ray_resources",
            module="verl.single_controller.ray.base",
            attribute="ResourcePoolManager._check_resource_available",
            wrapper=_enough_cpus,
            feature="cpu",
            required=False,
            why="verl counts the cluster's GPUs or NPUs before it starts its workers; on a CPU it is CPUs they hold.",
            upstream=f"{SOURCE}/v0.9.1/verl/single_controller/ray/base.py#L226",
            until="verl counts what its platform calls ray_resource_name()",
        ),
    ]
