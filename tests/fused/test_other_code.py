"""What other code does with fused modules works as natively: hooks, pickles, copies, Liger, torch's transforms."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from processes import PLAIN, output  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from fused.test_fused import make  # noqa: E402
from fused.test_lookalikes import MLP, Norm, WithDropout  # noqa: E402
from fused.test_state import VALUES, own  # noqa: E402

ADDERS = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre-hook": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "hook of all modules": lambda module, seen: nn.modules.module.register_module_forward_hook(
        lambda called, *_: seen.append(1) if called is module else None
    ),
}


class Experts(nn.Module):
    """Experts as transformers 5 keeps them, and with a flat parameter as FSDP1 leaves them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(128))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, values):
        return self._apply_gate(values)


MODULES = {
    "MLP": (lambda: MLP(nn.SiLU()), "act_fn", "gated"),
    "dropout": (WithDropout, "dropout", "gated"),
    "experts": (Experts, "act_fn", "gated_halves"),
}


@pytest.mark.parametrize("how", ADDERS)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_of_what_the_kernel_takes_in_are_called(name, how, kernels, fuse):
    construct, child, kernel = MODULES[name]
    module, seen, values = construct(), [], VALUES.clone().requires_grad_()
    fuse(module)
    module(values).sum().backward()
    used = kernels.calls[kernel]
    assert used == 2, "its check and itself"
    handle = ADDERS[how](getattr(module, child), seen)
    try:
        module(values).sum().backward()
        assert seen == [1]
    finally:
        handle.remove()
    module(values).sum().backward()
    assert seen == [1]
    assert kernels.calls[kernel] == used + 1


def test_a_fused_model_is_saved_whole_and_loads_with_and_without_the_overlay(kernels, fuse, tmp_path):
    model = make("Qwen2")
    ids = torch.arange(6)[None]
    expected = model(input_ids=ids).logits
    made = fuse(model, ("rms_norm", "gated_mlp"))
    model(input_ids=ids)
    assert made.running == made.counts == {"rms_norm": 5, "gated_mlp": 2}
    torch.save(model, tmp_path / "model.pt")
    torch.save(expected, tmp_path / "expected.pt")
    before = dict(kernels.calls)
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(input_ids=ids).logits, expected)
    assert kernels.calls == before, "what is loaded is another model, and native"
    program = f"""
import sys, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(input_ids=torch.arange(6)[None]).logits, torch.load({str(tmp_path / "expected.pt")!r}))
print("verl_fl_overlay.kernels" in sys.modules, any("forward" in vars(module) for module in model.modules()))
"""
    assert output(program, env=PLAIN) == "False False"


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", [Norm, lambda _: MLP(nn.SiLU()), lambda _: Experts()], ids=["norm", "MLP", "experts"])
def test_a_copy_has_its_own_weights_is_native_and_can_be_fused(kind, duplicate, kernels, fuse):
    module = kind(8)
    made = fuse(module)
    module(VALUES)
    twin, before = duplicate(module), dict(kernels.calls)
    for child in twin.modules():
        if "weight" in child._parameters:
            child._parameters = {**child._parameters, "weight": nn.Parameter(torch.full_like(child.weight, 3.0))}
    found = twin(VALUES)
    assert kernels.calls == before
    if isinstance(module, Norm):
        torch.testing.assert_close(found, 3 * functional.rms_norm(VALUES, (8,), eps=1e-6))
    fuse(twin)
    torch.testing.assert_close(twin(VALUES), found)
    assert kernels.calls != before
    made.remove()
    before = dict(kernels.calls)
    for each in (module, twin):
        each(VALUES)
        assert not {"forward", "_apply_gate"} & vars(each).keys()
    assert kernels.calls == before


def test_a_forward_that_liger_puts_into_the_class_later_stays(kernels, fuse, monkeypatch):
    native = Norm.forward

    def theirs(self, x):
        return 7 * x

    norm = Norm(8)
    made = fuse(norm)
    ours = Norm.forward
    assert ours is not native
    Norm.forward = theirs
    try:
        made.remove()
        assert Norm.forward is theirs
        torch.testing.assert_close(norm(VALUES), 7 * VALUES)
    finally:
        Norm.forward = native
    torch.testing.assert_close(ours(norm, VALUES), native(norm, VALUES), msg="who kept ours has native by it")
    assert not kernels.calls["norm"]


def test_beside_liger_the_log_says_whose_kernels_run(kernels, fuse, caplog):
    class LigerRMSNorm(Norm):
        def forward(self, x):
            return super().forward(x)

    LigerRMSNorm.__module__ = LigerRMSNorm.forward.__module__ = "liger_kernel.transformers.rms_norm"

    def swiglu(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))

    swiglu.__module__ = "liger_kernel.transformers.swiglu"
    mlp = MLP()
    mlp.forward = swiglu.__get__(mlp)
    with caplog.at_level(logging.INFO, logger="verl_fl_overlay"):
        made = fuse(nn.Sequential(LigerRMSNorm(8), mlp))
    assert not made.counts
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "Sequential runs on what liger_kernel put in; nothing is left to fuse")
    ]


def test_a_subclass_that_calls_a_fused_class_s_forward_stays_itself(kernels, fuse):
    class Doubled(Norm):
        def forward(self, x):
            return 2 * super().forward(x)

    norms = nn.ModuleList([Norm(8), Doubled(8)])
    made = fuse(norms)
    torch.testing.assert_close(norms[1](VALUES), 2 * norms[0](VALUES))
    assert made.counts == {"rms_norm": 2}
    assert made.running == {"rms_norm": 1}


def squares(module):
    return lambda x: module(x).square().sum()


TRANSFORMED = {
    "vmap": lambda module: torch.vmap(module)(VALUES[None].expand(3, -1, -1)),
    "grad": lambda module: torch.func.grad(squares(module))(VALUES),
    "jvp": lambda module: torch.func.jvp(module, (VALUES,), (VALUES.cos(),))[1],
    "jacrev": lambda module: torch.func.jacrev(module)(VALUES),
    "hessian": lambda module: torch.func.hessian(squares(module))(VALUES[0]),
    "forward mode": lambda module: dual(module),
    "functional_call": lambda module: torch.func.functional_call(module, dict(module.named_parameters()), (VALUES,)),
}


def dual(module):
    with torch.autograd.forward_ad.dual_level():
        result = module(torch.autograd.forward_ad.make_dual(VALUES, VALUES.cos()))
        return torch.autograd.forward_ad.unpack_dual(result).tangent


@pytest.mark.parametrize("how", TRANSFORMED)
@pytest.mark.parametrize("kind", [Norm, lambda _: MLP(nn.SiLU()), lambda _: Experts()], ids=["norm", "MLP", "experts"])
def test_under_torch_s_transforms_native_code_runs_and_decides_nothing(kind, how, kernels, fuse, agreement):
    module = kind(8)
    expected = TRANSFORMED[how](module)
    made = fuse(module)
    torch.testing.assert_close(TRANSFORMED[how](module), expected)
    assert bool(agreement.checks()) == (how == "functional_call")
    torch.testing.assert_close(module(VALUES), own(module))
    assert set(agreement.checks().values()) == {"same"}
    assert made.running.total() == 1


UNITS = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from fused.stand_ins import StandIns
from fused.test_lookalikes import MLP, Norm
stand_ins = StandIns()
sys.modules.update(stand_ins.modules())
from verl_fl_overlay.kernels import agreement
from verl_fl_overlay.kernels.model import FusedModules
agreement.NATIVE_DEVICES = ()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
model = nn.Sequential(Norm(8), MLP(), Norm(8))
values = torch.randn(4, 8)
expected = model(values).detach()
for module in model:
    fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
found = agreement.Agreement()
made = FusedModules(("rms_norm", "gated_mlp"), found)
made.fuse(model)
for _ in range(2):
    result = model(values)
    torch.testing.assert_close(result.detach(), expected)
    result.sum().backward()
print(set(found.checks().values()), sorted(made.running.items()))
dist.destroy_process_group()
"""


def test_norms_and_mlps_that_fsdp2_shards_as_units_of_their_own():
    assert (
        output(UNITS, env={**PLAIN, "PYTHONPATH": os.pathsep.join(sys.path)})
        == "{'same'} [('gated_mlp', 1), ('rms_norm', 2)]"
    )
