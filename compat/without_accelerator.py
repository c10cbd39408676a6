"""What a CPU (VERL_FL_DEVICE=cpu) needs in each release, in addition to what every chip unknown to verl needs."""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.compat import process_group
from verl_fl_overlay.devices.cpu import CPU_MODULE
from verl_fl_overlay.events import enough_cpus
from verl_fl_overlay.hooks import Call, Hook

SOURCE = "https://github.com/volcengine/verl/blob"


def _device_module(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return CPU_MODULE


def _enough_cpus(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    import ray

    enough_cpus.ask(
        ray.available_resources().get("CPU", 0),
        instance.get_n_gpus(),
        "Lower trainer.n_gpus_per_node or trainer.nnodes, or raise ray_kwargs.ray_init.num_cpus.",
    )


def _accept_cpu_states(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _not_pinned(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(pin_memory=False)


def _nothing_to_offload(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return wrapped(offload_params=False)


def _activations_stay(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def shared_hooks() -> list[Hook]:
    """Return what every release needs."""
    return [
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
        Hook(
            name="cpu.offload",
            module="torch.distributed.fsdp.api",
            attribute="CPUOffload.__init__",
            wrapper=_nothing_to_offload,
            feature="cpu",
            required=False,
            why="Under FSDP1 verl offloads engines that are never trained, and torch pins what it offloads, which it "
            "refuses where there is no accelerator; on a CPU all is offloaded already.",
            upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/fsdp/_flat_param.py#L1257",
            until="torch ignores pin_memory where there is no accelerator",
        ),
        Hook(
            name="cpu.activation_offload",
            module="verl.utils.activation_offload",
            attribute="enable_activation_offloading",
            wrapper=_activations_stay,
            feature="cpu",
            required=False,
            why="enable_activation_offload copies activations to pinned memory of the CPU, which torch refuses where "
            "there is no accelerator; on a CPU they are there already.",
            upstream=f"{SOURCE}/v0.9.1/verl/utils/activation_offload.py#L171",
            until="torch ignores pin_memory where there is no accelerator",
        ),
    ]


def device_helper_hooks() -> list[Hook]:
    """Return what the releases without a platform layer (0.7, 0.8) need."""
    return [
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
    return [
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
            relies_on=("verl.single_controller.ray.base:ResourcePoolManager.get_n_gpus",),
        ),
    ]
