"""Lets an engine's Adam or AdamW step with torch's own fused kernel, where verl's configuration leaves that open.

torch's default on a device launches one kernel for each operation of a step and holds a copy of all parameters while it
does; fused is one kernel, and no copy.  verl's ``optim.override_optimizer_config`` can ask for either; then it stays.
What a checkpoint holds is what it would hold without the overlay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from verl_fl_overlay.fused_check import Pair, Random

STEPS = 3
"""Steps of the numerical check; the first alone would not show a state that is wrong."""


class FusedAdam:
    """The optimizers of this process that may step with the fused kernel."""

    def __init__(self) -> None:
        self._handles: WeakKeyDictionary[Optimizer, tuple[Any, ...]] = WeakKeyDictionary()

    def fuse(self, optimizer: Any) -> bool:
        """Let ``optimizer`` take the fused kernel; return False if it has none, or its user chose how it steps."""
        from torch.optim import Adam, AdamW

        if type(optimizer) not in (Adam, AdamW) or optimizer in self._handles:
            return False
        if not all(_is_open(group) for group in optimizer.param_groups):
            return False
        # Decided at each step and not here: by then verl has brought offloaded parameters and states to the device,
        # and a checkpoint that was loaded has brought its own groups and states.
        self._handles[optimizer] = (
            optimizer.register_step_pre_hook(_choose),
            optimizer.register_state_dict_post_hook(_as_without),
        )
        return True

    def remove(self) -> None:
        """Let every optimizer step as it did before."""
        for optimizer, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            for group in optimizer.param_groups:
                group["fused"] = None
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].cpu()
        self._handles.clear()


def _is_open(group: dict[str, Any]) -> bool:
    """Whether torch would choose how this group steps."""
    unchosen = group.get("foreach") is None and group.get("fused") is None
    return unchosen and not group.get("capturable") and not group.get("differentiable")


def _choose(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Be what runs before each step."""
    for group in optimizer.param_groups:
        if _is_open(group):
            group["fused"] = all(_has_kernel(optimizer, group, parameter) for parameter in group["params"]) or None
        if group["fused"]:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if "step" in state:  # torch keeps it on the CPU for the default, and on the device for the kernel
                    state["step"] = state["step"].to(parameter.device)


def _as_without(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Be what runs on each state dict before its user sees it."""
    for group in state_dict["param_groups"]:
        group["fused"] = None
    for index, state in state_dict["state"].items():
        if "step" in state:
            state_dict["state"][index] = {**state, "step": state["step"].cpu()}


def _has_kernel(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> bool:
    from verl_fl_overlay import fused_check

    dtype, device = parameter.dtype, parameter.device
    if dtype not in fused_check.TOLERANCE or device.type in fused_check.NATIVE_DEVICES:
        return False
    kind, options = type(optimizer), {name: group[name] for name in ("amsgrad", "maximize")}
    return fused_check.agree(("adam", kind, dtype, *options.values()), device, _steps, kind, options, device)


def _steps(random: Random, kind: Any, options: dict[str, bool], device: Any) -> Pair:
    import torch

    # A chip's torch may answer with the CPU's kernel, slowly, for what it has none for.
    name = f"aten::_fused_{kind.__name__.lower()}_"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, torch._C._dispatch_key_for_device(device.type)):
        raise NotImplementedError(f"torch has no {name} for {device.type}")

    def stepped(fused: bool | None) -> Any:
        def run(values: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
            parameter = torch.nn.Parameter(values.detach().clone())
            optimizer = kind([parameter], lr=1.0, weight_decay=0.1, **options)
            optimizer.param_groups[0]["fused"] = fused
            for gradient in gradients:
                parameter.grad = gradient.detach().clone()
                optimizer.step()
            return ((parameter - values).detach(),)

        return run

    return tuple(random(7, 33) for _ in range(1 + STEPS)), stepped(None), stepped(True)
