"""Platforms for chips without one in verl: verl's interface, filled from the chip table and ``torch.<device>``."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

from verl_fl_overlay import events
from verl_fl_overlay.compat import engines
from verl_fl_overlay.devices import chips
from verl_fl_overlay.devices.chips import Chip
from verl_fl_overlay.hooks import Call, Hook

logger = logging.getLogger("verl_fl_overlay")

SOURCE = "https://github.com/volcengine/verl/blob/v0.9.1/verl/plugin/platform"


def _platform_name(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    from verl.plugin.platform.platform_manager import PlatformRegistry

    chip = events.chip.ask()
    if chip is None:  # the feature has not started yet, or was stopped
        return str(wrapped(*args, **kwargs))
    asked = os.environ.get("VERL_PLATFORM", "").strip().lower()
    names = (asked if chips.called(asked) is chip else chip.vendor, chip.vendor, chip.device)
    for name in names:
        if PlatformRegistry.get(name) is not None:
            return name
    PlatformRegistry.register(platform=names[0])(platform_class(chip))
    return names[0]


def _device_name(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    chip = events.chip.ask()
    return chip.device if chip and chips.is_available(chip) else str(wrapped(*args, **kwargs))


def _configured_device(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["config"]
    wrapped(*args, **kwargs)
    chip, given = events.chip.ask(), getattr(getattr(config, "trainer", None), "device", None)
    if chip is None or given in (None, "cpu", chip.device):
        return
    logger.warning(
        "trainer.device is %s, and this process trains on %s: trainer.device=%s is used",
        given,
        chip.vendor,
        chip.device,
    )
    config.trainer.device = chip.device


def _backend(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    found = str(wrapped(*args, **kwargs))
    return events.chip_backend.ask(found) or found


def _engine_class(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    chip = events.chip.ask()
    chosen = os.environ.get("VERL_ENGINE_DEVICE") or os.environ.get("VERL_ENGINE_VENDOR")
    found = engines.class_for_cuda(instance, chip.device, *args, **kwargs) if chip and not chosen else None
    return wrapped(*args, **kwargs) if found is None else found


def platform_class(chip: Chip) -> type[Any]:
    """Build the class when it is needed, and not at import: its base class is verl's."""
    return _like_cuda(chip) if chip.device == "cuda" else _of_its_own(chip)


def _like_cuda(chip: Chip) -> type[Any]:
    """Return verl's own platform under the vendor's name, for a chip that torch calls cuda."""
    from verl.plugin.platform import platform_cuda, platform_rocm

    base = platform_rocm.PlatformROCm if chip.on_rocm else platform_cuda.PlatformCUDA
    return type(f"Platform{chip.vendor.title()}", (base,), {"vendor_name": chip.vendor})


def _of_its_own(chip: Chip) -> type[Any]:
    from contextlib import nullcontext

    from verl.plugin.platform.platform_base import PlatformBase

    class PlatformOfChip(PlatformBase):  # type: ignore[misc]
        device_name = chip.device
        vendor_name = chip.vendor

        @property
        def device_module(self) -> Any:
            return chips.device_module(chip)

        def is_available(self) -> bool:
            return chips.is_available(chip)

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return self.is_available()

        def current_device(self) -> Any:
            return self.device_module.current_device()

        def device_count(self) -> int:
            return int(self.device_module.device_count())

        def set_device(self, device_index: int) -> None:
            self.device_module.set_device(device_index)

        def synchronize(self, device_index: int | None = None) -> None:
            self.device_module.synchronize(device_index)

        def manual_seed(self, seed: int) -> None:
            self.device_module.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            self.device_module.manual_seed_all(seed)

        def set_allocator_settings(self, settings: str) -> None:
            change = getattr(getattr(self.device_module, "memory", None), "_set_allocator_settings", None)
            if change is not None:  # it only saves memory: a device without it trains all the same
                change(settings)

        def empty_cache(self) -> None:
            self.device_module.empty_cache()

        def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
            ask = getattr(self.device_module, "get_device_capability", None)
            return (ask(device_index) if ask else None) or (None, None)

        def communication_backend_name(self) -> str:
            return events.flagcx_backend.ask() or chips.backend(chip)

        def visible_devices_envvar(self) -> str:
            return chip.visible_devices

        def nvtx_range(self, msg: str) -> Any:
            return nullcontext()

        def profiler_start(self) -> None:
            pass

        def profiler_stop(self) -> None:
            pass

        def ray_resource_name(self) -> str:
            return chip.ray_resource

        def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
            own = {"GPU": "num_gpus", "CPU": "num_cpus"}.get(chip.ray_resource)
            return {own: num_gpus} if own else {"resources": {chip.ray_resource: num_gpus}}

        def ray_noset_envvars(self) -> list[str]:
            if chip is chips.CPU:
                return []
            names = {
                chip.visible_devices,
                "CUDA_VISIBLE_DEVICES" if chip.ray_resource == "GPU" else chip.visible_devices,
            }
            return [f"RAY_EXPERIMENTAL_NOSET_{name}" for name in sorted(names)]

        def rollout_env_vars(self) -> dict[str, str]:
            return {}

        def is_ipc_supported(self) -> bool:
            return chip.ipc

        def cudart(self) -> Any:
            return None

    PlatformOfChip.__name__ = PlatformOfChip.__qualname__ = f"Platform{chip.device.upper()}"
    return PlatformOfChip


def platform_hooks() -> list[Hook]:
    """Return what the releases with a platform layer (0.9 on) need."""
    return [
        Hook(
            name="chip.platform",
            module="verl.plugin.platform.platform_manager",
            attribute="_detect_platform_name",
            wrapper=_platform_name,
            feature="chip",
            required=True,
            why="verl has platforms for cuda, npu and rocm and falls back to 'nvidia'; the overlay's platform for the "
            "chip, or for the CPU, is registered and named, unless somebody registered one for it.",
            upstream=f"{SOURCE}/platform_manager.py",
            until="verl, or a plugin, registers a platform for the chip, and one for the CPU",
            relies_on=(
                "verl.plugin.platform.platform_base:PlatformBase",
                "verl.plugin.platform.platform_cuda:PlatformCUDA",
                "verl.plugin.platform.platform_rocm:PlatformROCm",
                "verl.plugin.platform.platform_manager:PlatformRegistry.get",
                "verl.plugin.platform.platform_manager:PlatformRegistry.register",
            ),
        ),
        engine_class_hook(),
        configured_device_hook(required=False),
    ]


def configured_device_hook(required: bool) -> Hook:
    """Return what every release needs; it is ``required`` where another hook of its module is."""
    return Hook(
        name="chip.configured_device",
        module="verl.utils.device",
        attribute="auto_set_device",
        wrapper=_configured_device,
        feature="chip",
        required=required,
        why="verl's configurations say trainer.device=cuda unless it knows the chip, and torch then stops with an "
        "AssertionError; the device of the chip, or of the CPU, is written there, as verl does for an NPU.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/device.py#L152",
        until="verl takes trainer.device from its platform, the CPU's too",
    )


def engine_class_hook() -> Hook:
    """Return what every release needs."""
    return Hook(
        name="chip.engine_class",
        module=engines.BASE,
        attribute="EngineRegistry.get_engine_cls",
        wrapper=_engine_class,
        feature="chip",
        required=True,
        why="verl registers its engines for cuda and npu only; another chip and the CPU, unless somebody registered an "
        "engine for it, get the class that serves cuda.",
        upstream=f"{engines.UPSTREAM}/base.py#L400",
        until="verl's engines are registered for every device that torch knows",
        relies_on=(f"{engines.BASE}:EngineRegistry._engines", f"{engines.BASE}:EngineRegistry.register"),
    )


def device_helper_hooks() -> list[Hook]:
    """Return what the releases without a platform layer (0.7, 0.8) need.

    This is enough for engines in processes that torchrun starts.  It is not enough for 0.7's legacy workers, nor for
    Ray: those releases ask Ray only for GPUs or NPUs.
    """
    source = "https://github.com/volcengine/verl/blob/v0.8.0/verl/utils/device.py"
    return [
        Hook(
            name="chip.device_name",
            module="verl.utils.device",
            attribute="get_device_name",
            wrapper=_device_name,
            feature="chip",
            required=True,
            why="verl says cpu on a chip that it does not know; torch's name of the chip's device is said.",
            upstream=f"{source}#L70",
            until="verl 0.9.0, which asks its platform",
        ),
        Hook(
            name="chip.backend",
            module="verl.utils.device",
            attribute="get_nccl_backend",
            wrapper=_backend,
            feature="chip",
            required=True,
            why="verl says nccl on every machine that has no NPU; the chip's own collectives are named, gloo on a CPU.",
            upstream=f"{source}#L116",
            until="verl 0.9.0, which asks its platform",
        ),
        engine_class_hook(),
        configured_device_hook(required=True),
    ]
