"""verl's own process groups with FlagCX, whose torch plugin is a stand-in: gloo, registered as ``flagcx`` for cuda."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
from real_engine import free_port
from sft import without_images

pytest.importorskip("torch")
verl = pytest.importorskip("verl")

PLUGIN = """
    import os
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch.distributed as dist
    os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD")
    def create(store, rank, size, timeout):
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    dist.Backend.register_backend("flagcx", create, devices=["cuda"])
"""

PROGRAM = """
    import os, torch, verl
    import torch.distributed as dist
    import verl.utils.device as device
    if hasattr(device, "is_cuda_available"):
        device.is_cuda_available = True  # verl before 0.9 tells the device by this
    from verl.utils.distributed import initialize_global_process_group_ray
    try:
        {body}
    except BaseException as error:
        print("ERROR", type(error).__name__, error)
"""

GROUPS = """
        initialize_global_process_group_ray()
        def show(name):
            ones = torch.ones(3)
            dist.all_reduce(ones)
            gathered = [None]
            dist.all_gather_object(gathered, name)
            print(name, dist.get_backend_config(), ones.tolist(), gathered)
            dist.destroy_process_group()
        show("verl")
        dist.init_process_group("flagcx")
        show("bare")
        print("autoload", os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
"""


@pytest.fixture
def flagcx(tmp_path):
    """A folder as FlagCX's build leaves it: the library (another one) and the plugin (a stand-in)."""
    (tmp_path / "build/lib").mkdir(parents=True)
    shutil.copy(find_spec("_ctypes").origin, tmp_path / "build/lib/libflagcx.so")
    package = tmp_path / "plugin/torch/flagcx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(PLUGIN))
    return tmp_path


def run(body: str, **environment: str) -> list[str]:
    body = textwrap.indent(textwrap.dedent(body).strip(), " " * 4)
    code = textwrap.dedent(PROGRAM).replace("    {body}", body)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={
            **os.environ,
            **without_images(),
            "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
            "VERL_PLATFORM": "nvidia",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "RANK": "0",
            "WORLD_SIZE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = ("verl ", "bare ", "autoload ", "ERROR ", "OK")
    return [line for line in done.stdout.splitlines() if line.startswith(told)]


def test_verls_groups_and_bare_ones_use_flagcx_beside_gloo(flagcx):
    assert run(GROUPS, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx), TORCH_DEVICE_BACKEND_AUTOLOAD="1") == [
        "verl cpu:gloo,cuda:flagcx [1.0, 1.0, 1.0] ['verl']",
        "bare cpu:gloo,cuda:flagcx [1.0, 1.0, 1.0] ['bare']",
        "autoload 1",
    ]


def test_without_use_flagcx_nothing_of_it_is_touched(flagcx):
    body = """
        import sys
        from verl.utils.device import get_nccl_backend
        print("OK", get_nccl_backend(), "flagcx" in sys.modules)
"""
    assert run(body, FLAGCX_PATH=str(flagcx)) == ["OK nccl False"]


@pytest.mark.parametrize("order", ["verl_fl_overlay,another", "another,verl_fl_overlay"])
def test_a_plugin_that_had_verl_take_its_backend_first_is_told(tmp_path, order):
    (tmp_path / "another.py").write_text("import verl.utils.distributed")
    body = """
        from verl.utils.distributed import get_nccl_backend
        from verl_fl_overlay.activation import active
        print("OK", get_nccl_backend(), *(text for text in active().conflicts if "too late" in text))
"""
    late = (
        "nccl USE_FLAGCX=1 comes too late: verl had taken the name of its collectives before verl-fl-overlay was "
        "loaded. List the overlay first: VERL_USE_EXTERNAL_MODULES=verl_fl_overlay,another"
    )
    told = late if order.startswith("another") and verl.__version__ < "0.9" else "flagcx"
    found = run(body, USE_FLAGCX="1", PYTHONPATH=str(tmp_path), VERL_USE_EXTERNAL_MODULES=order)
    assert found == [f"OK {told}"]


THROUGH = {
    "nccl": "NCCL (HCCL on Ascend)",
    "kimi_ckpt_engine": "vLLM's own communicator",
    **({"delta_sharded": "NCCL"} if verl.__version__ >= "0.9" else {}),
}


@pytest.mark.skipif(verl.__version__ == "0.7.0", reason="verl 0.7.0 has neither")
def test_checkpoint_engines_and_groups_past_torch_are_refused(flagcx):
    body = f"""
        from verl.checkpoint_engine.base import CheckpointEngineRegistry as registry
        from verl.utils.distributed import stateless_init_process_group
        print("OK", registry.get("naive").__name__)
        for name in {list(THROUGH)}:
            for ask in (registry.new, registry.get):
                try:
                    ask(name)
                except RuntimeError as error:
                    print("ERROR", type(error).__name__, error)
        stateless_init_process_group("127.0.0.1", 1, 0, 1, "cuda")
"""
    refused = [
        f"ERROR FlagCXError verl's checkpoint engine {name!r} communicates through {through}, and "
        "USE_FLAGCX=1 asks for FlagCX. Take another one (actor_rollout_ref.rollout.checkpoint_engine.backend=naive, "
        "nixl or mooncake), or leave this check out with "
        "VERL_FL_DISABLE=flagcx.checkpoint_engine,flagcx.checkpoint_engine_class,flagcx.stateless_group"
        for name, through in THROUGH.items()
        for _ in range(2)
    ]
    assert run(body, USE_FLAGCX="1", FLAGCX_PATH=str(flagcx)) == [
        "OK ColocatedCheckpointEngine",
        *refused,
        "ERROR FlagCXError verl's stateless_init_process_group communicates through NCCL (HCCL on Ascend), and "
        "USE_FLAGCX=1 asks for FlagCX. Take torch's groups, unset USE_FLAGCX, or leave this check out with "
        "VERL_FL_DISABLE=flagcx.stateless_group",
    ]
