"""``doctor`` tries what is asked for: fabricated components that raise, end the interpreter, crash, hang or lie."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from processes import run

import verl_fl_overlay

HERE = str(Path(verl_fl_overlay.__file__).parents[1])

INIT = """
__version__ = "0.9.1"
import os
for module in filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")):
    __import__(module)
"""

NAMED = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_DISABLE": "*"}
CPU = {**NAMED, "VERL_FL_DEVICE": "cpu"}


@pytest.fixture
def site(tmp_path):
    """Return a folder with a small verl in it."""
    write(tmp_path, "verl", INIT, "0.9.1")
    return tmp_path


def write(site: Path, module: str, code: str, version: str = "", *, points: str = "", requires: str = "") -> None:
    """Write a package, and the metadata that an installation leaves if it has a version."""
    (site / module).mkdir(exist_ok=True)
    (site / module / "__init__.py").write_text(code)
    if version:
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n{requires}")
        info.joinpath("entry_points.txt").write_text(points)


def torch(site: Path, devices: int) -> None:
    """Write a torch that sees this many CUDA devices."""
    available = f"is_available = staticmethod(lambda: {bool(devices)})"
    write(
        site,
        "torch",
        f"__version__ = '2.11.0'\nclass cuda:\n    {available}\n    device_count = staticmethod(lambda: {devices})\n"
        "class cpu: pass\ndef get_device_module(): return cuda",
        "2.11.0",
        requires="Requires-Dist: triton==3.6.0; platform_system == 'Linux'",
    )


def doctor(site: Path, environment: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the real command; return its status, its report, and what it wrote to standard error."""
    path = os.pathsep.join([str(site), HERE])
    env = {**environment, "PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    done = run("-m", "verl_fl_overlay", "doctor", "--json", *arguments, env=env)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    report = json.loads(done.stdout)
    # The fabricated torch has no tensors.
    report["problems"] = [p for p in report["problems"] if not p.startswith("attention cannot be tried here: Attr")]
    return done.returncode, report, done.stderr


def problem(report: dict[str, Any], beginning: str) -> str:
    (found,) = [text for text in report["problems"] if text.startswith(beginning)]
    assert "\n" not in found
    return found


def test_nothing_asked_for_is_no_problem(site):
    status, report, _ = doctor(site, CPU)
    assert (status, report["problems"], report["components"]) == (0, [], {})
    assert report["versions"]["wrapt"]
    assert report["overlay folder"] == str(Path(verl_fl_overlay.__file__).parent)


def test_no_accelerator_and_nothing_says_cpu(site):
    torch(site, devices=0)
    status, report, _ = doctor(site, NAMED)
    assert status == 1
    assert report["device"] == "none"
    assert "to train on the CPU, export VERL_FL_DEVICE=cpu" in problem(report, "torch has no accelerator here (")


def test_an_accelerator_is_found(site):
    torch(site, devices=2)
    status, report, _ = doctor(site, {**NAMED, "VERL_PLATFORM": "nvidia"})
    assert (status, report["problems"], report["device"]) == (0, [], "2 x cuda")


@pytest.mark.parametrize(
    ("named", "chip", "device"),
    [("mthreads", "mthreads", "musa"), ("npu", "ascend", "npu"), ("huawei", "ascend", "npu")],
)
def test_a_chip_whose_torch_is_not_there(site, named, chip, device):
    torch(site, devices=2)
    status, report, _ = doctor(site, {**NAMED, "VERL_PLATFORM": named})
    assert status == 1
    here = f"the chip is {chip} (VERL_PLATFORM={named}) and torch has no {device} here, which torch_{device} brings: "
    told = problem(report, here)
    assert told.endswith(f"No module named 'torch_{device}'. Install that, or correct VERL_PLATFORM")


def test_a_driver_that_crashes_is_told_with_the_accelerator(site):
    torch(site, devices=2)
    code = (site / "torch" / "__init__.py").read_text()
    (site / "torch" / "__init__.py").write_text(code.replace("lambda: 2", "lambda: __import__('os').kill(0, 11)"))
    status, report, _ = doctor(site, {**NAMED, "VERL_PLATFORM": "nvidia"})
    assert status == 1
    told = problem(report, "accelerator is asked for (VERL_PLATFORM=nvidia) and cannot be used: ")
    assert told.endswith("crashes: SIGSEGV. Training would end or hang there too")


def test_a_chip_whose_torch_raises(site):
    torch(site, devices=2)
    write(site, "torch_musa", "raise OSError('libmusart.so:\\ncannot open shared object file')")
    status, report, _ = doctor(site, {**NAMED, "VERL_PLATFORM": "mthreads"})
    assert status == 1
    assert "OSError: libmusart.so: cannot open shared object file" in problem(report, "the chip is mthreads")


GEMS = {**CPU, "USE_FLAGGEMS": "1"}
NATIVE = ". Training would go on with native operators and one warning"
ENDS = ". Training would end or hang there too"


@pytest.mark.parametrize(
    ("code", "said", "without"),
    [
        ("raise RuntimeError('No device were\\n   detected')", "RuntimeError: No device were detected", NATIVE),
        ("raise RuntimeError('x' * 100_000)", "xxx...", NATIVE),
        ("import sys; sys.exit(3)", "it ends the interpreter (SystemExit: 3)", ENDS),
        ("import os; os._exit(0)", "a process that imports it ends with status 0", ENDS),
        (
            "import os, sys; print('driver: no', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)",
            "a process that imports it crashes: SIGSEGV. driver: no",
            ENDS,
        ),
    ],
)
def test_a_component_that_does_not_survive_its_import(site, code, said, without):
    torch(site, devices=0)
    write(site, "flag_gems", code, "5.3.4")
    status, report, _ = doctor(site, GEMS)
    assert status == 1
    told = problem(report, "FlagGems is asked for (USE_FLAGGEMS=1) and cannot be used: ")
    assert said in told
    assert len(told) < 700
    assert told.endswith(without)
    assert report["components"]["FlagGems"]["fault"]
    assert report["verl"]["supported"]


def test_a_component_that_hangs(site):
    torch(site, devices=0)
    write(site, "flag_gems", "import subprocess; subprocess.run(['sleep', '600'])", "5.3.4")
    begun = time.monotonic()
    status, report, _ = doctor(site, GEMS, "--timeout", "3")
    assert time.monotonic() - begun < 60
    assert status == 1
    assert "it did not end within 3 s; --timeout waits longer" in problem(report, "FlagGems")


FLAG_GEMS = """
__version__ = "5.3.5"
vendor_name = "nvidia"
class Registrar:
    reg_key = "CUDA"
    def __init__(self, config, user_include_ops=None, user_exclude_ops=None):
        for key, function in config: self.register_impl(key, function)
def mm(*args): pass
def enable(lib=None, unused=None, registrar=Registrar):
    global current_work_registrar
    current_work_registrar = registrar([("mm", mm)])
"""
TORCH_C = "\nclass _C:\n    _dispatch_find_schema_or_throw = staticmethod(lambda name, overload: None)\n"


def test_a_version_that_the_metadata_tell_wrongly(site):
    torch(site, devices=1)
    with open(site / "torch" / "__init__.py", "a") as file:
        file.write(TORCH_C)
    write(site, "triton", "", "3.6.0")
    write(site, "flag_gems", FLAG_GEMS, "5.0.0")
    status, report, stderr = doctor(site, {**NAMED, "USE_FLAGGEMS": "1", "GEMS_VENDOR": "nvidia"})
    assert (status, report["problems"]) == (0, []), stderr
    assert report["versions"]["flag_gems"] == "5.3.5 (its metadata say 5.0.0)"
    told = report["components"]["FlagGems"]
    assert (told["vendor"], told["operators"]) == ("nvidia", 1)
    assert told["file"] == str(site / "flag_gems" / "__init__.py")


def test_versions_that_do_not_fit_are_told_and_do_not_stop(site):
    torch(site, devices=1)
    with open(site / "torch" / "__init__.py", "a") as file:
        file.write(TORCH_C)
    write(site, "triton", "", "3.7.1")
    write(site, "flag_gems", FLAG_GEMS.replace("5.3.5", "5.0.2"), "5.0.2")
    status, report, _ = doctor(site, {**NAMED, "USE_FLAGGEMS": "1", "GEMS_VENDOR": "nvidia"})
    assert status == 0
    assert [text.partition(" (http")[0] for text in report["problems"]] == [
        "flag_gems 5.0.2 is made for torch>=2.5,<2.10",
        "flag_gems 5.0.2 is made for triton>=3.0,<3.7",
        "torch 2.11.0 asks for triton==3.6.0, and triton 3.7.1 is here",
    ]
    assert report["problems"][0].endswith(", and torch 2.11.0 is here")


POINTS = "[vllm.platform_plugins]\nfl = vllm_fl:register\n"
PLUGIN = "def register(): return 'vllm_fl.Platform'\nclass Platform: pass"


@pytest.mark.parametrize(
    ("plugin", "version", "vllm", "fault"),
    [
        (PLUGIN, "0.1.0+vllm0.13.0", "0.13.0", ""),
        (PLUGIN, "0.2.0", "0.20.2", ""),
        ("def register(): return None", "0.2.0", "0.20.2", "the plugin takes this machine for none of its own"),
        ("def register(): return 'vllm_fl.Gone'", "0.2.0", "0.20.2", "AttributeError"),
        ("import flag_gems_that_is_missing", "0.2.0", "0.20.2", "No module named 'flag_gems_that_is_missing'"),
        (None, "", "0.20.2", "no installed package has the entry point 'fl' of vllm.platform_plugins"),
        (PLUGIN, "0.2.0", "", "vllm is not installed: pip install vllm"),
    ],
)
@pytest.mark.parametrize("asked", ["VLLM_PLUGINS=fl", "VLLM_FL_STRICT=1"])
def test_vllms_plugin_is_loaded_as_vllm_does(site, plugin, version, vllm, fault, asked):
    if plugin is not None:
        write(site, "vllm_fl", plugin, version, points=POINTS)
    if vllm:
        write(site, "vllm", f"__version__ = '{vllm}'", vllm)
    status, report, _ = doctor(site, {**CPU, **dict([asked.split("=")])})
    assert status == int(bool(fault)), report["problems"]
    if fault:
        by = asked if asked.startswith("VLLM_PLUGINS") else "VLLM_FL_STRICT"
        told = problem(report, f"vllm-plugin-FL is asked for ({by}) and cannot be used: ")
        assert fault in told
        assert told.endswith("vLLM would go on without the plugin and say so in its log only")
    else:
        assert report["problems"] == []
        assert report["components"]["vllm-plugin-FL"]["platform"] == "vllm_fl.Platform"


@pytest.mark.parametrize(
    ("version", "vllm", "made_for"),
    [
        ("0.1.0", "0.24.0", "vllm==0.13.*"),
        ("0.2.0", "0.24.0", "vllm==0.20.2"),
        ("0.2.0+vllm0.28.0", "0.24.0", "vllm==0.28.0"),
    ],
)
def test_a_plugin_for_another_vllm(site, version, vllm, made_for):
    write(site, "vllm_fl", PLUGIN, version, points=POINTS)
    write(site, "vllm", "", vllm)
    status, report, _ = doctor(site, {**CPU, "VLLM_PLUGINS": "fl"})
    assert status == 0
    assert problem(report, f"vllm_fl {version} is made for {made_for} (").endswith(", and vllm 0.24.0 is here")


def test_a_vllm_that_verl_does_not_name(site):
    (site / "verl-0.9.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\nRequires-Dist: vllm==0.24.0; extra == 'vllm'\n"
    )
    write(site, "vllm_fl", PLUGIN, "0.2.0", points=POINTS)
    write(site, "vllm", "", "0.20.2")
    status, report, _ = doctor(site, {**CPU, "VLLM_PLUGINS": "fl"})
    assert (status, report["problems"]) == (0, ["verl 0.9.1 asks for vllm==0.24.0, and vllm 0.20.2 is here"])


def test_a_plugin_that_is_left_out_is_not_asked_for(site):
    assert doctor(site, {**CPU, "VLLM_PLUGINS": "other", "SGLANG_PLUGINS": "__none__"})[1]["components"] == {}


def test_what_asks_for_a_plugin_is_told_in_short(site):
    """Newer versions read variables that the table does not have; an empty list of SGLang's is no list."""
    of_newer = {f"VLLM_FL_THING_{n}": "1" for n in range(50)}
    _, report, _ = doctor(site, {**CPU, **of_newer, "SGLANG_PLUGINS": "", "SGLANG_FLAGGEMS_RECORD": "1"})
    asked = {name: tried["asked for by"] for name, tried in report["components"].items()}
    assert asked == {
        "vllm-plugin-FL": "VLLM_FL_THING_0, VLLM_FL_THING_1, VLLM_FL_THING_10, 47 more",
        "sglang-plugin-FL": "SGLANG_FLAGGEMS_RECORD",
    }


def test_sglangs_plugin(site):
    asked = {**CPU, "SGLANG_FL_PREFER": "flagos"}
    status, report, _ = doctor(site, asked)
    assert status == 1
    assert "sglang is not installed" in problem(report, "sglang-plugin-FL is asked for (SGLANG_FL_PREFER)")
    points = "[sglang.srt.platforms]\nsglang_fl = sglang_fl:a\n[sglang.srt.plugins]\nsglang_fl = sglang_fl:b\n"
    write(site, "sglang", "__version__ = '0.5.12'", "0.5.12")
    write(site, "flag_gems", "", "5.3.4")
    write(site, "sglang_fl", "a = b = print", "0.1.0", points=points, requires="Requires-Dist: flag-gems==4.2.*\n")
    status, report, _ = doctor(site, asked)
    assert status == 0
    assert problem(report, "sglang_fl 0.1.0 is made for sglang==0.5.11 (").endswith(", and sglang 0.5.12 is here")
    assert problem(report, "sglang_fl 0.1.0 asks for flag_gems==4.2.*, and flag_gems 5.3.4 is here")


def test_flagcx_without_a_plugin(site):
    torch(site, devices=1)
    status, report, _ = doctor(site, {**NAMED, "USE_FLAGCX": "1", "GEMS_VENDOR": "nvidia"})
    assert status == 1
    told = problem(report, "FlagCX is asked for (USE_FLAGCX=1) and cannot be used: ")
    assert told.endswith("Training would fail at its first process group")


def test_flagcx_with_what_it_tells(site):
    """Whatever ``load`` tells is shown, and a conflict is a problem; it does not change the device that trains."""
    torch(site, devices=1)
    write(site, "sitecustomize", SITE)
    status, report, _ = doctor(site, {**NAMED, "USE_FLAGCX": "1", "GEMS_VENDOR": "nvidia", "FLAGCX_PATH": str(site)})
    assert status == 0, report["problems"]
    told = report["components"]["FlagCX"]
    assert (told["plugin"], told["library"], told["device"]) == ("/flagcx.py", "/lib.so", "cuda")
    assert "two libraries" in report["problems"]
    assert report["device"] == "1 x cuda"


SITE = """
import sys
if "verl_fl_overlay.cli.attempt" in " ".join(sys.orig_argv):
    import dataclasses
    from verl_fl_overlay.features import flagcx
    found = [("plugin", "/flagcx.py"), ("library", "/lib.so"), ("device", "cuda"), ("conflict", "two libraries")]
    flagcx.load = dataclasses.make_dataclass("Loaded", [(n, str, dataclasses.field(default=v)) for n, v in found])
"""


def test_a_stale_plugin_that_breaks_torch_is_told_once(site):
    """torch imports every installed plugin of torch.backends, whatever USE_FLAGCX says."""
    stale = "Failed to load the backend extension: flagcx. You can disable it with TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    write(site, "torch", f"raise RuntimeError({stale!r})")
    (site / "verl" / "__init__.py").write_text(INIT + "import torch")
    status, report, _ = doctor(site, NAMED)
    assert status == 1
    assert report["problems"] == [
        f"verl cannot be imported: RuntimeError: {stale}. Where it fails: python -c 'import verl'"
    ]


@pytest.mark.parametrize(
    ("package", "variable", "build"),
    [
        ("transformer_engine", "TE_FL_PREFER", "TransformerEngine-FL"),
        ("megatron", "MG_FL_PREFER", "Megatron-LM-FL"),
    ],
)
def test_another_build_than_the_one_asked_for(site, package, variable, build):
    status, report, _ = doctor(site, {**CPU, variable: "flagos"})
    assert status == 1
    assert f"{build} is not installed (no build is here)" in problem(report, f"{build} is asked for ({variable})")
    write(site, package, "", "2.9.0")
    status, report, _ = doctor(site, {**CPU, variable: "flagos"})
    assert status == 1
    assert f"{build} is not installed (NVIDIA's build is here)" in problem(report, f"{build} is asked for ({variable})")


def test_megatron_lm_fl_that_is_here(site):
    write(site, "megatron", "")
    write(site, "megatron/plugin", "")
    (site / "megatron" / "plugin" / "decorators.py").write_text("")
    status, report, _ = doctor(site, {**CPU, "MG_FL_PREFER": "musa"})
    assert (status, report["problems"]) == (0, [])
    assert report["components"]["Megatron-LM-FL"]["file"].endswith("decorators.py")


def test_reports_that_cannot_be_written(site):
    (site / "taken").write_text("")
    status, report, _ = doctor(site, {**CPU, "VERL_FL_REPORT_DIR": str(site / "taken")})
    assert status == 1, "training would run without the reports that are asked for"
    assert problem(report, f"VERL_FL_REPORT_DIR={site / 'taken'} cannot be written (")


def test_a_malformed_setting_is_told_once(site):
    torch(site, devices=2)
    status, report, _ = doctor(site, {**NAMED, "VERL_FL_DEVICE": "gpu", "VERL_PLATFORM": "nvidia"})
    assert status == 1
    (told,) = report["problems"]
    assert "VERL_FL_DEVICE='gpu': allowed is one of 'auto', 'cpu'" in told


def test_what_others_print_is_no_part_of_the_report(site):
    """Python's print, the file descriptor, and C's buffer, which is written when the process ends."""
    said = "import ctypes, os; print('one'); os.write(1, b'two'); ctypes.CDLL(None).printf(b'three')\n"
    (site / "verl" / "__init__.py").write_text(said + INIT)
    status, report, stderr = doctor(site, CPU)
    assert (status, report["problems"]) == (0, [])
    assert all(word in stderr for word in ("one", "two", "three"))


def test_doctor_leaves_no_report(site):
    status, report, _ = doctor(site, {**CPU, "VERL_FL_REPORT_DIR": str(site / "reports")})
    assert (status, report["problems"]) == (0, [])
    assert list((site / "reports").iterdir()) == []


def test_the_text_has_no_calls_and_names_what_was_tried(site):
    write(site, "flag_gems", "raise RuntimeError('broken')", "5.3.4")
    env = {**GEMS, "PYTHONPATH": os.pathsep.join([str(site), HERE])}
    done = run("-m", "verl_fl_overlay", "doctor", env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "flag_gems        5.3.4" in lines
    assert any(line.split() == ["FlagGems", "USE_FLAGGEMS=1", "no"] for line in lines)
    assert any(
        line.startswith("hooks: ") and line.endswith("all are as they should be: --all lists them") for line in lines
    )
