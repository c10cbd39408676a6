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

    from verl_fl_overlay.kernels.agreement import Pair, Random, Run

CHOSEN = 1
"""What a group's ``fused`` is where it was chosen here: torch takes it for True, which is what its user would write."""

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
            optimizer.register_state_dict_post_hook(_show),
        )
        return True

    def remove(self) -> None:
        """Let every optimizer step as it did before."""
        for optimizer, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            _unchoose(optimizer.param_groups, optimizer.state)
        self._handles.clear()


def _is_open(group: dict[str, Any]) -> bool:
    """Whether torch would choose how this group steps."""
    unchosen = group.get("foreach") is None and group.get("fused") is None
    return unchosen and not group.get("capturable") and not group.get("differentiable")


def _choose(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Be what runs before each step."""
    import torch

    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        if _is_open(group):
            # Up to torch 2.8 the kernel does not take parameters of several meshes, as expert parallelism has them.
            on_one_mesh = len({getattr(parameter, "device_mesh", None) for parameter in trained}) == 1
            if on_one_mesh and all(_has_kernel(optimizer, group, parameter) for parameter in trained):
                group["fused"] = CHOSEN
        if group["fused"] is CHOSEN:
            for parameter in trained:
                state = optimizer.state.get(parameter, {})
                if "step" in state:  # torch keeps it on the CPU for its default, and like this for the kernel
                    state["step"] = state["step"].to(parameter.device, torch.float32)


def _show(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Be what runs on each state dict, whose groups and states are named by number, before its user sees it."""
    _unchoose(state_dict["param_groups"], state_dict["state"])


def _unchoose(groups: list[dict[str, Any]], states: Any) -> None:
    """Make ``groups``, and ``states`` of their parameters, what they would be without the overlay."""
    for group in groups:
        if group["fused"] is CHOSEN:
            group["fused"] = None
            for parameter in group["params"]:
                if "step" in states.get(parameter, {}):  # a new one: a state dict holds the optimizer's own
                    states[parameter] = {**states[parameter], "step": states[parameter]["step"].cpu()}


def _has_kernel(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> bool:
    from verl_fl_overlay.kernels import agreement as fused_check

    dtype, device = parameter.dtype, parameter.device
    if dtype not in fused_check.TOLERANCE or device.type in fused_check.NATIVE_DEVICES:
        return False
    kind, names = type(optimizer), ("amsgrad", "maximize", "decoupled_weight_decay")
    options = {name: group[name] for name in names if name in group}  # the last is not in every torch
    return fused_check.agree(("adam", kind, dtype, *options.values()), device, _steps, kind, options, device)


def _steps(random: Random, kind: Any, options: dict[str, bool], device: Any) -> Pair:
    import torch

    # A chip's torch may answer with the CPU's kernel, slowly, for what it has none for.
    decoupled = options.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    name = f"aten::_fused_adam{'w' if decoupled else ''}_"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, torch._C._dispatch_key_for_device(device.type)):
        raise NotImplementedError(f"torch has no {name} for {device.type}")

    def stepped(fused: int | None) -> Run:
        def run(values: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
            parameter = torch.nn.Parameter(values.detach().clone())
            # torch's default epsilon is zero in fp16, and native's numbers are then infinite.
            optimizer = kind([parameter], lr=1.0, weight_decay=0.1, eps=1e-3)
            optimizer.param_groups[0].update(options, fused=fused)
            for gradient in gradients:
                parameter.grad = gradient.detach().clone()
                optimizer.step()
            return ((parameter - values).detach(),)

        return run

    return tuple(random(7, 33) for _ in range(1 + STEPS)), stepped(None), stepped(CHOSEN)
