"""Lets an engine's Adam or AdamW step with torch's own fused kernel, where verl's configuration leaves that open.

By default torch launches one kernel per operation of a step on a device, and holds a copy of all parameters meanwhile.
The fused step is one kernel and needs no copy.  If verl's ``optim.override_optimizer_config`` asks for either of them,
that stays.  A checkpoint holds the same as without the overlay.

The factor of gradient clipping is not given to the kernel as its ``grad_scale``, which would save a pass over the
gradients.  The kernel divides by that number, and dividing by 1 / c does not round as multiplying by c does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from verl_fl_overlay.kernels.agreement import Agreement, Pair, Run, Samples, can_be_checked

CHOSEN = 1.0
"""The value of a group's ``fused`` if the overlay has chosen it.

torch takes it for True.  A user writes True or 1, so the type tells the two apart, also in copies and in files, which a
process without the overlay can read.
"""


class FusedAdam:
    """The optimizers of this process that may step with the fused kernel."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._handles: WeakKeyDictionary[Optimizer, tuple[Any, ...]] = WeakKeyDictionary()

    @property
    def counts(self) -> Counter[str]:
        """How many they are, as {"adam": 1}."""
        return +Counter(adam=len(self._handles))

    @property
    def running(self) -> Counter[str]:
        """How many of them have stepped with the kernel."""
        groups = (optimizer.param_groups for optimizer in self._handles)
        return +Counter(adam=sum(any(type(each["fused"]) is float for each in group) for group in groups))

    def fuse(self, optimizer: Any) -> bool:
        """Let ``optimizer`` take the fused kernel; return False if it has none, or its user chose how it steps."""
        if type(optimizer) not in (Adam, AdamW) or optimizer in self._handles:
            return False
        if not all(_is_open(group) for group in optimizer.param_groups):
            return False
        # The choice is made at each step and not here.  By then verl has brought offloaded parameters and states to
        # the device, and a checkpoint that was loaded has brought its own groups and states.
        self._handles[optimizer] = (
            optimizer.register_step_pre_hook(self._choose),
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

    def _choose(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose for each group, before each step."""
        for group in optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            if _is_open(group):
                # Up to torch 2.8 the kernel does not take parameters of several meshes, as expert parallelism has them.
                on_one_mesh = len({getattr(parameter, "device_mesh", None) for parameter in trained}) == 1
                if on_one_mesh and all(self._has_kernel(type(optimizer), group, parameter) for parameter in trained):
                    group["fused"] = CHOSEN
            if type(group["fused"]) is float:
                for parameter in trained:
                    state = optimizer.state.get(parameter, {})
                    if "step" in state:  # on the CPU for torch's default, like this for the kernel
                        state["step"] = state["step"].to(parameter.device, torch.float32)

    def _has_kernel(self, kind: type[Optimizer], group: dict[str, Any], parameter: Tensor) -> bool:
        dtype, device = parameter.dtype, parameter.device
        if not can_be_checked(dtype, device):
            return False
        names = ("amsgrad", "maximize", "decoupled_weight_decay")
        options = {name: group[name] for name in names if name in group}  # not every torch has the last one
        return self._agreement.agree(("adam", kind, dtype, *options.items()), device, _pair, kind, options, device)


def _is_open(group: dict[str, Any]) -> bool:
    """Whether torch would choose how this group steps."""
    unchosen = group.get("foreach") is None and group.get("fused") is None
    return unchosen and not group.get("capturable") and not group.get("differentiable")


def _show(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Change a new state dict before its user sees it; it names groups and states by number."""
    _unchoose(state_dict["param_groups"], state_dict["state"])


def _unchoose(groups: list[dict[str, Any]], states: Any) -> None:
    """Make ``groups``, and ``states`` of their parameters, what they would be without the overlay."""
    for group in groups:
        if type(group["fused"]) is float:
            group["fused"] = None
            for parameter in group["params"]:
                if "step" in states.get(parameter, {}):  # a new dict, since a state dict shares the optimizer's
                    states[parameter] = {**states[parameter], "step": states[parameter]["step"].cpu()}


def _pair(samples: Samples, kind: Any, options: dict[str, bool], device: torch.device) -> Pair:
    # If a chip's torch has no kernel of its own it may fall back to the CPU's, which is slow.
    decoupled = options.get("decoupled_weight_decay", kind is AdamW)
    name = f"aten::_fused_adam{'w' if decoupled else ''}_"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, torch._C._dispatch_key_for_device(device.type)):
        raise NotImplementedError(f"torch has no {name} for {device.type}")

    def stepped(fused: bool | None) -> Run:
        def run(values: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
            parameter = torch.nn.Parameter(values.detach().clone())
            # With these values three steps show, in any type, what takes hundreds of steps with the defaults.  torch's
            # default epsilon is zero in fp16, and native's numbers are then infinite.
            optimizer = kind([parameter], lr=1.0, betas=(0.8, 0.6), weight_decay=0.1, eps=0.1)
            optimizer.param_groups[0].update(options, fused=fused)
            for gradient in gradients:
                parameter.grad = gradient.detach().clone()
                optimizer.step()
            return ((parameter - values).detach(),)

        return run

    # Gradients far below epsilon and far above it.  The second ones are small: amsgrad's maximum is then a past one.
    scales = torch.tensor((0.1, 0.3, 1, 1, 3, 30))
    gradients = [samples.rows((scales * each).tolist(), 33) for each in (1, 0.1, 1)]
    return (samples.normal(6, 33), *gradients), stepped(None), stepped(True)
