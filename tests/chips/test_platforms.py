"""verl's platform layer on chips it does not know; ``torch.<device>`` is a stand-in, verl is the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
from sft import without_images

from verl_fl_overlay import events
from verl_fl_overlay.compat.flash_attn import value_model_hook
from verl_fl_overlay.devices.chips import CHIPS, CPU, KNOWN_TO_VERL, find, without_platform
from verl_fl_overlay.features import reason_off
from verl_fl_overlay.features.chip import UnknownChip
from verl_fl_overlay.settings import Settings

pytest.importorskip("torch")
verl = pytest.importorskip("verl")

needs_platforms = pytest.mark.skipif(verl.__version__ < "0.9", reason="verl has no platform layer before 0.9")

PACKAGE = """
    import sys, types, torch
    device = __name__.removeprefix("torch_")
    module = getattr(torch, device, None) or types.ModuleType(f"torch.{device}")  # torch always has torch.xpu
    module.calls = []
    def record(name, result):
        return lambda *a, **k: module.calls.append(name) or result
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache"):
        setattr(module, name, record(name, None))
    module.is_available = lambda: True
    module.device_count = lambda: 8
    module.current_device = lambda: 3
    module.get_device_capability = lambda index: (3, 1)
    setattr(torch, device, module)
"""

PROGRAM = """
    import json, verl
    from verl.plugin.platform import get_platform
    from verl.utils.device import get_device_name, get_nccl_backend, get_torch_device
    p = get_platform()
    p.set_device(1); p.synchronize(); p.manual_seed(1); p.manual_seed_all(1); p.empty_cache()
    p.set_allocator_settings("expandable_segments:True"); p.profiler_start(); p.profiler_stop()
    with p.nvtx_range("x"):
        pass
    from verl.workers.engine import EngineRegistry
    from verl.plugin.platform.platform_manager import PlatformRegistry
    engine = EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__
    assert type(p) is PlatformRegistry.get(p.vendor_name)
    print("TOLD", json.dumps([
        get_device_name(), p.vendor_name, get_nccl_backend(), p.device_count(), p.current_device(),
        p.get_device_capability(), p.visible_devices_envvar(), p.ray_resource_name(), p.ray_resource_options(0.5),
        p.ray_noset_envvars(), p.is_ipc_supported(), p.cudart(), p.is_available(), get_torch_device().calls, engine,
    ]))
"""


HELPERS = """
    import json, verl
    from verl.utils.device import get_device_id, get_device_name, get_nccl_backend, get_torch_device
    from verl.workers.engine import EngineRegistry
    engine = EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__
    module = get_torch_device()
    module.empty_cache()
    print("TOLD", json.dumps([get_device_name(), get_device_id(), get_nccl_backend(), module.calls, engine]))
"""


def run(folder, device, program=PROGRAM, **environment):
    """Run ``program`` where ``torch.<device>`` is the stand-in, brought by a vendor's package or by torch."""
    (folder / f"torch_{device}").mkdir()
    (folder / f"torch_{device}/__init__.py").write_text(textwrap.dedent(PACKAGE))
    brought = "import verl, torch_xpu\n" if device == "xpu" else ""
    done = subprocess.run(
        [sys.executable, "-c", brought + textwrap.dedent(program)],
        cwd="/",
        env={
            **os.environ,
            **without_images(),
            "PYTHONPATH": str(folder),
            "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD "))


CALLS = '["set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache"], "FSDPEngineWithLMHead"]'


@needs_platforms
def test_musa_gets_a_platform(tmp_path):
    assert run(tmp_path, "musa") == (
        '["musa", "mthreads", "mccl", 8, 3, [3, 1], "MUSA_VISIBLE_DEVICES", "GPU", {"num_gpus": 0.5}, '
        '["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_MUSA_VISIBLE_DEVICES"], '
        f"false, null, true, {CALLS}"
    )


@needs_platforms
def test_mlu_gets_a_platform_that_honours_flagcx(tmp_path):
    assert run(tmp_path, "mlu", USE_FLAGCX="1") == (
        '["mlu", "cambricon", "flagcx", 8, 3, [3, 1], "MLU_VISIBLE_DEVICES", "GPU", {"num_gpus": 0.5}, '
        '["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_MLU_VISIBLE_DEVICES"], '
        f"true, null, true, {CALLS}"
    )


@needs_platforms
@pytest.mark.parametrize(("flagcx", "backend"), [("0", "xccl"), ("1", "flagcx")])
@pytest.mark.parametrize("named", [{"GEMS_VENDOR": "intel"}, {"VERL_PLATFORM": "intel"}, {"VERL_PLATFORM": "XPU"}])
def test_xpu_gets_a_platform(tmp_path, named, flagcx, backend):
    asked = named.get("VERL_PLATFORM", "intel").lower()
    program = PROGRAM.replace("PlatformRegistry.get(p.vendor_name)", f"PlatformRegistry.get({asked!r})")
    assert run(tmp_path, "xpu", program, USE_FLAGCX=flagcx, **named) == (
        f'["xpu", "intel", "{backend}", 8, 3, [3, 1], "ZE_AFFINITY_MASK", "GPU", {{"num_gpus": 0.5}}, '
        '["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_ZE_AFFINITY_MASK"], '
        f"false, null, true, {CALLS}"
    )


ANOTHERS = """
    import verl
    from verl.plugin.platform import get_platform
    from verl.plugin.platform.platform_manager import PlatformRegistry
    from verl_fl_overlay.devices.chips import CHIPS
    from verl_fl_overlay.compat.platforms import platform_class

    @PlatformRegistry.register(platform="musa")
    class Anothers(platform_class(CHIPS["mthreads"])):
        pass

    print("TOLD", type(get_platform()).__name__, "mthreads" in PlatformRegistry.registered_names())
"""


@needs_platforms
def test_a_platform_of_somebody_else_for_the_chip_goes_first(tmp_path):
    assert run(tmp_path, "musa", ANOTHERS) == "Anothers False"


CUDA_LIKE = """
    import json, verl
    from verl.plugin.platform import get_platform
    from verl.plugin.platform.platform_manager import PlatformRegistry
    from verl.utils.device import get_nccl_backend
    from verl.workers.engine import EngineRegistry
    engine = EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__
    p = get_platform()
    assert type(p) is PlatformRegistry.get(p.vendor_name)
    base = type(p).__mro__[1].__name__
    print("TOLD", json.dumps([p.device_name, p.vendor_name, base, get_nccl_backend(), p.is_ipc_supported(), engine]))
"""


@needs_platforms
@pytest.mark.parametrize(
    ("vendor", "base"),
    [
        ("metax", "PlatformCUDA"),
        ("iluvatar", "PlatformCUDA"),
        ("kunlunxin", "PlatformCUDA"),
        ("thead", "PlatformCUDA"),
        ("hygon", "PlatformROCm"),
    ],
)
def test_a_chip_that_calls_itself_cuda_gets_verls_platform_under_its_own_name(tmp_path, vendor, base):
    told = f'["cuda", "{vendor}", "{base}", "flagcx", true, "FSDPEngineWithLMHead"]'
    assert run(tmp_path, "unused", CUDA_LIKE, USE_FLAGCX="1", GEMS_VENDOR=vendor) == told


@pytest.mark.parametrize(("flagcx", "backend"), [("0", "mccl"), ("1", "flagcx")])
def test_verls_helpers_name_the_chip_in_every_release(tmp_path, flagcx, backend):
    told = run(tmp_path, "musa", HELPERS, USE_FLAGCX=flagcx)
    assert told == f'["musa", 3, "{backend}", ["empty_cache"], "FSDPEngineWithLMHead"]'


@needs_platforms
@pytest.mark.parametrize("vendor", [vendor for vendor in CHIPS if vendor not in KNOWN_TO_VERL])
def test_every_abstract_method_is_implemented(vendor):
    from verl_fl_overlay.compat.platforms import platform_class

    platform = platform_class(CHIPS[vendor])
    assert platform.__abstractmethods__ == frozenset()
    assert platform().device_name == CHIPS[vendor].device


@needs_platforms
def test_on_the_cpu_ray_hides_what_it_always_hides():
    from verl_fl_overlay.compat.platforms import platform_class

    assert platform_class(CPU)().ray_noset_envvars() == []


@needs_platforms
def test_before_the_feature_has_started_verl_answers_for_itself():
    from verl_fl_overlay.compat.platforms import device_helper_hooks, platform_hooks

    def verls_own(*args):
        return "verl's own"

    def answers():
        hooks = {hook.name: hook for hook in (*platform_hooks(), *device_helper_hooks())}
        del hooks["chip.configured_device"]  # it answers nothing, and changes the configuration that it is given
        return {name: hook.wrapper(verls_own, None, (), {}) for name, hook in hooks.items()}

    assert events.chip.ask() is None
    assert set(answers().values()) == {"verl's own"}
    feature = UnknownChip(Settings.from_environment({"GEMS_VENDOR": "mthreads", "VERL_PLATFORM": "musa"}))
    feature.start()
    assert events.chip.ask() is CHIPS["mthreads"]
    feature.stop()
    assert set(answers().values()) == {"verl's own"}


@pytest.mark.parametrize(
    ("environment", "device", "reason"),
    [
        ({"VERL_FL_DEVICE": "cpu", "VERL_PLATFORM": "nvidia"}, "cpu", ""),
        ({"VERL_PLATFORM": " XPU"}, "xpu", ""),
        ({"VERL_PLATFORM": "metax"}, "cuda", ""),
        ({"VERL_PLATFORM": "flagos"}, "flagos", ""),
        ({"VERL_PLATFORM": "supa"}, "supa", ""),
        ({"VERL_PLATFORM": "nvidia"}, None, "verl has a platform for nvidia (VERL_PLATFORM=nvidia)"),
        ({"VERL_PLATFORM": "huawei"}, None, "verl has a platform for ascend (VERL_PLATFORM=huawei)"),
        ({"VERL_PLATFORM": "nobody"}, None, "VERL_PLATFORM=nobody is no chip that is known here"),
    ],
)
def test_the_chip_is_chosen(environment, device, reason):
    settings = Settings.from_environment(environment)
    chip = without_platform(settings)
    assert (chip.device if chip else None, reason_off("chip", settings)) == (device, reason)


@pytest.mark.parametrize(
    ("environment", "packages", "commands", "vendor", "told_by"),
    [
        ({}, [], [], None, "no vendor's package or tool is there"),
        ({}, [], ["nvidia-smi"], "nvidia", "nvidia-smi is there"),
        ({}, [], ["nvidia-smi", "mx-smi"], "metax", "mx-smi is there"),
        ({}, ["torch_musa"], ["nvidia-smi"], "mthreads", "torch_musa is installed"),
        ({"GEMS_VENDOR": "Hygon "}, ["torch_musa"], [], "hygon", "GEMS_VENDOR=hygon"),
        ({}, ["torch+xpu"], ["xpu-smi"], "intel", "torch+xpu is installed"),
        ({}, [], ["xpu-smi"], "kunlunxin", "xpu-smi is there"),
        ({}, [], ["nvidia-smi", "xpu-smi"], "nvidia", "nvidia-smi is there"),
        ({"GEMS_BACKEND": "metax"}, [], ["nvidia-smi"], "metax", "GEMS_BACKEND=metax"),
        ({"GEMS_VENDOR": "nobody"}, ["torch_npu"], [], None, "GEMS_VENDOR=nobody is no vendor that is known here"),
        (
            {"FLAGGEMS_BACKEND": "aipu"},
            [],
            ["nvidia-smi"],
            None,
            "FLAGGEMS_BACKEND=aipu is no vendor that is known here",
        ),
        ({"GEMS_VENDOR": ""}, [], ["nvidia-smi"], "nvidia", "nvidia-smi is there"),
        ({"PPU_SDK": "/usr/local/PPU_SDK", "GEMS_VENDOR": "nvidia"}, [], ["nvidia-smi"], "thead", "PPU_SDK is set"),
        ({}, [], ["nvidia-smi", "ppu-smi"], "thead", "ppu-smi is there"),
        ({}, [], ["pt-smi"], "sunrise", "pt-smi is there"),
        ({}, [], ["pt_smi"], "sunrise", "pt_smi is there"),
        ({}, [], ["brsmi"], "biren", "brsmi is there"),
        ({}, ["torch_supa"], [], "biren", "torch_supa is installed"),
        ({}, ["torch_fl"], ["nvidia-smi"], "flagos", "torch_fl is installed"),
        ({}, ["torch_fl", "torch_npu"], [], "ascend", "torch_npu is installed"),
        ({"GEMS_VENDOR": "enflame"}, ["torch_fl", "torch_gcu"], [], "enflame", "GEMS_VENDOR=enflame"),
        (
            {"GEMS_VENDOR": "enflame"},
            ["torch_fl"],
            [],
            "flagos",
            "GEMS_VENDOR=enflame, and of torch_fl and torch_gcu only torch_fl is installed",
        ),
    ],
)
def test_the_chip_is_found_without_importing_anything(environment, packages, commands, vendor, told_by):
    chip, reason = find(environment, installed=packages.__contains__, command=lambda c: c if c in commands else None)
    assert (chip.vendor if chip else None, reason) == (vendor, told_by)


@pytest.fixture
def load_value_model(tmp_path, monkeypatch):
    """Return verl's function as it is with the hook, for a device and a configuration, where flash-attn is missing."""
    transformers = pytest.importorskip("transformers")
    device, model = pytest.importorskip("verl.utils.device"), pytest.importorskip("verl.utils.model")
    monkeypatch.setattr("verl_fl_overlay.compat.flash_attn.flash_attn_imports", lambda: False)

    def load(name: str, config: str, **configured: str):
        monkeypatch.setattr(device, "get_device_name", lambda: name)
        arguments = str(tmp_path), None, getattr(transformers, config)(**configured), False
        return value_model_hook().wrapper(model.load_valuehead_model, None, arguments, {})

    return load


@pytest.mark.parametrize(
    ("device", "configured", "attention"),
    [
        ("cuda", {}, "flash_attention_2"),
        ("cuda", {"attn_implementation": "sdpa"}, "sdpa"),
        ("npu", {"attn_implementation": "sdpa"}, "flash_attention_2"),
    ],
)
def test_a_value_model_gets_the_configured_attention_but_on_an_npu(
    load_value_model, monkeypatch, device, configured, attention
):
    from transformers import AutoModelForTokenClassification

    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", lambda **asked: asked)
    assert load_value_model(device, "Qwen2Config", **configured)["attn_implementation"] == attention


@pytest.mark.skipif(find_spec("trl") is not None, reason="with trl verl goes on to load the model")
def test_a_model_without_token_classification_is_left_to_verl(load_value_model):
    with pytest.raises(RuntimeError, match="is not a value head model, please install trl"):
        load_value_model("cuda", "Qwen2VLConfig")


def test_a_checkpoint_that_is_damaged_is_told_as_it_is(load_value_model, monkeypatch):
    from transformers import AutoModelForTokenClassification

    def damaged(**asked):
        raise OSError("header too large")

    monkeypatch.setattr(AutoModelForTokenClassification, "from_pretrained", damaged)
    with pytest.raises(OSError, match="header too large"):
        load_value_model("cuda", "Qwen2Config")
