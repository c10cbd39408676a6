"""What the overlay puts around FlagCX's collectives; FlagCX is a backend that computes nothing and holds nothing."""

from __future__ import annotations

import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from process_group.test_flagcx_groups import run

from verl_fl_overlay.features import flagcx_collectives

pytest.importorskip("torch")
pytest.importorskip("verl")

PLUGIN = """
    import torch.distributed as dist
    from torch._C._distributed_c10d import FakeProcessGroup, FakeWork
    del FakeWork.wait  # FlagCX's works have no class in Python
    def create(common, options):
        return FakeProcessGroup._create_internal(common.group_rank, common.group_size, FakeProcessGroup.Options())
    dist.Backend.register_backend("flagcx", create, extended_api=True, devices=["cpu", "cuda"])
"""

LIVES = """
        import weakref
        import torch.distributed._functional_collectives as functional
        from torch.distributed.distributed_c10d import _coalescing_manager
        dist.init_process_group("cpu:flagcx,cuda:gloo")
        group = dist.group.WORLD
        def gathered(*tensors, **options):
            with _coalescing_manager(group, **options, async_ops=True) as works:
                for one, other in zip(tensors[::2], tensors[1::2]):
                    dist.all_gather_into_tensor(one, other)
            return works
        def sent(one, other):
            with _coalescing_manager(group, torch.device("cpu"), async_ops=True) as works:
                group.send([one], 0, 0)
                group.recv([other], 0, 0)
            return works
        class Result:
            def __init__(self, tensor):
                self.tensor = tensor
            def wait(self):
                functional.wait_tensor(self.tensor)
                self.tensor = None
        calls = dict(
            all_reduce=lambda a, b: dist.all_reduce(a, async_op=True),
            broadcast=lambda a, b: dist.broadcast(a, 0, async_op=True),
            all_gather_into_tensor=lambda a, b: dist.all_gather_into_tensor(b, a, async_op=True),
            reduce_scatter_tensor=lambda a, b: dist.reduce_scatter_tensor(b, a, async_op=True),
            all_to_all_single=lambda a, b: dist.all_to_all_single(b, a, async_op=True),
            send=lambda a, b: group.send([a], 0, 0),
            coalesced=lambda a, b: gathered(b, a),
            batched=lambda a, b: sent(a, b),
            functional=lambda a, b: Result(
                torch.ops._c10d_functional.all_gather_into_tensor(a, 1, group.group_name)),
        )
        for name, call in calls.items():
            first, second = torch.ones(4), torch.ones(4)
            living = weakref.ref(first)
            work = call(first, second)
            del first, second
            before = living() is not None
            work.wait()
            print("OK", name, before, living() is not None)
"""
NAMES = (
    *("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "send"),
    *("coalesced", "batched", "functional"),
)


@pytest.fixture
def flagcx(tmp_path) -> Path:
    """A folder as FlagCX's build leaves it: the library (another one) and the plugin (a stand-in)."""
    (tmp_path / "build/lib").mkdir(parents=True)
    shutil.copy(find_spec("_ctypes").origin, tmp_path / "build/lib/libflagcx.so")
    package = tmp_path / "plugin/torch/flagcx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(PLUGIN))
    return tmp_path


@pytest.mark.parametrize("disabled", ["", "flagcx.memory"])
def test_tensors_live_until_their_collective_is_waited_for(flagcx, disabled):
    environment = {"VERL_FL_DISABLE": disabled} if disabled else {}
    found = run(LIVES, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx), **environment)
    assert found == [f"OK {name} {not disabled} False" for name in NAMES]


def test_works_that_nobody_waits_for_keep_a_bounded_number_of_tensors(flagcx):
    body = """
        from verl_fl_overlay.activation import active
        dist.init_process_group("cpu:flagcx,cuda:gloo")
        recorded = []
        torch.Tensor.record_stream = lambda tensor, stream: recorded.append(len(tensor))
        works = [dist.all_reduce(torch.ones(n), async_op=True) for n in range(1, 36)]
        kept = active().features._started["flagcx"].guards.kept
        print("OK", len(kept), recorded)
        dist.all_reduce(torch.ones(36))
        print("OK", len(kept), recorded == list(range(1, 36)), "a later collective of the group was waited for")
"""
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx)) == [
        "OK 32 [1, 2, 3]",
        "OK 0 True a later collective of the group was waited for",
    ]


def test_threads_that_keep_tensors_at_the_same_time(monkeypatch):
    monkeypatch.setattr(flagcx_collectives, "_hand_over", lambda kept: None)
    guards = flagcx_collectives.Collectives("flagcx")

    class Work:
        def wait(self):
            guards._release(id(self))

    def keep(group):
        for _ in range(20000):
            guards._keep(Work(), group, [])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(keep, "abcd"))
    finally:
        sys.setswitchinterval(interval)
    assert len(guards.kept) == flagcx_collectives.KEPT


def test_tensors_with_gaps_are_refused_by_nccls_rule(flagcx):
    body = """
        dist.init_process_group("cpu:flagcx,cuda:gloo")
        group = dist.group.WORLD
        other = dist.new_group([0], backend="gloo")
        square = torch.ones(4, 4)
        image = torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last)
        calls = dict(
            slice=lambda: dist.all_reduce(square[:, :2]),
            transposed=lambda: dist.broadcast(torch.ones(3, 4).t(), 0),
            output=lambda: dist.all_gather_into_tensor(square[:, 0], torch.ones(4)),
            channels=lambda: dist.all_reduce(image),
            lists=lambda: dist.all_gather([square[:, 0]], torch.ones(4)),
            sent=lambda: group.send([square[:, :2]], 0, 0),
            turned=lambda: group.send([square.t()], 0, 0),
            gloo=lambda: dist.all_reduce(square.t(), group=other),
        )
        for name, call in calls.items():
            try:
                call()
                print("OK", name)
            except Exception as error:
                print("OK", name, type(error).__name__, "not contiguous (shape" in str(error))
"""
    refused = "FlagCXError True"
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx)) == [
        f"OK slice {refused}",
        f"OK transposed {refused}",
        f"OK output {refused}",
        "OK channels",
        f"OK lists {refused}",
        f"OK sent {refused}",
        "OK turned",
        "OK gloo",
    ]
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx), VERL_FL_DISABLE="flagcx.contiguous")[0] == "OK slice"


def test_outputs_and_inputs_that_do_not_fit_are_refused_by_nccls_rule(flagcx):
    body = """
        dist.init_process_group("cpu:flagcx,cuda:gloo")
        group = dist.group.WORLD
        new = torch.zeros
        torch.Tensor.record_stream = lambda tensor, stream: None
        calls = dict(
            gather=lambda n: dist.all_gather_into_tensor(new(n), new(4)),
            scatter=lambda n: dist.reduce_scatter_tensor(new(4), new(n)),
            gathers=lambda n: group.allgather_into_tensor_coalesced([new(4), new(n)], [new(4), new(4)]),
            scatters=lambda n: group.reduce_scatter_tensor_coalesced([new(4), new(4)], [new(4), new(n)]),
            list=lambda n: dist.all_gather([new(n)], new(4)),
            lists=lambda n: dist.reduce_scatter(new(4), [new(n)]),
            longer=lambda n: dist.all_gather([new(4)] * (n - 3), new(4)),
            exchange=lambda n: dist.all_to_all_single(new(4), new(n)),
            splits=lambda n: dist.all_to_all_single(new(4), new(4), [n], [n]),
            type=lambda n: dist.all_gather_into_tensor(new(4), new(4, dtype=torch.int if n == 5 else torch.float)),
            root=lambda n: dist.gather(new(4), [new(n)]),
            parts=lambda n: dist.scatter(new(4), [new(n)]),
        )
        def error(call, n):
            try:
                call(n)
            except Exception as error:
                return type(error).__name__, "do not fit" in str(error)
        print("OK", {name: error(call, 4) for name, call in calls.items() if error(call, 4)})
        print("OK", {name: error(call, 5) for name, call in calls.items() if error(call, 5) != ("FlagCXError", True)})
"""
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx)) == ["OK {}", "OK {}"]
    found = run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx), VERL_FL_DISABLE="flagcx.sizes")
    assert "gather" in found[1], "torch refuses it itself"


def test_ignored_timeouts_are_told_once_and_all_is_taken_off_with_the_overlay(flagcx):
    body = """
        import logging
        names = ((dist.Work, "wait"), (dist.ProcessGroup, "_start_coalescing"), (dist.ProcessGroup, "_end_coalescing"))
        before = {(owner, name): vars(owner)[name] for owner, name in names}
        from verl_fl_overlay import activation
        class Told(logging.Handler):
            def emit(self, record):
                if "timeouts" in record.getMessage():
                    print("OK", record.getMessage())
        logging.getLogger("verl_fl_overlay").addHandler(Told())
        for _ in range(2):
            dist.init_process_group("cpu:flagcx,cuda:gloo")
            print("OK", activation.report()["features"]["flagcx"]["detail"]["guards"])
            dist.destroy_process_group()
        dist.init_process_group("cpu:flagcx,cuda:gloo")
        torch.Tensor.record_stream = lambda tensor, stream: print("OK handed over", len(tensor))
        running = dist.all_reduce(torch.ones(3), async_op=True)
        activation.deactivate()
        dist.all_reduce(torch.ones(4, 4)[:, :2])
        print("OK", [vars(owner)[name] is kept for (owner, name), kept in before.items()])
"""
    guards = "OK ['barrier', 'contiguous', 'memory', 'reductions', 'sizes', 'timeout']"
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx)) == [
        "OK FlagCX ignores timeouts, those of groups (nccl_timeout, 10 minutes if not set) and of Work.wait: if a rank "
        "fails, the others wait for it without end",
        guards,
        guards,
        "OK handed over 3",
        "OK [True, True, True]",
    ]
