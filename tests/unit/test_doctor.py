"""``doctor`` tries what is asked for: fabricated components that raise, end the interpreter, crash, hang or lie."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import packaging as packaging_module
import pytest
from processes import run

import verl_fl_overlay
from verl_fl_overlay.cli.doctor import as_text

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
        (PLUGIN, "0.2.0", "", "vllm is not installed: verl-fl install-hint vllm"),
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


@pytest.mark.parametrize(("tested", "fault"), [("0.24.0", ""), ("0.20.2", "vllm==0.20.2 (as its tests ask for)")])
def test_a_plugin_from_a_source_without_tags(site, tested, fault):
    """Its version is 0.0.0; its metadata name the vLLM that its tests need."""
    needs = f"Requires-Dist: vllm[audio]=={tested}; extra == 'test'\n"
    write(site, "vllm_fl", PLUGIN, "0.0.0+gdc7ba6243", points=POINTS, requires=needs)
    write(site, "vllm", "", "0.24.0")
    _, report, _ = doctor(site, {**CPU, "VLLM_PLUGINS": "fl"})
    made = f"vllm_fl 0.0.0+gdc7ba6243 is made for {fault}, and vllm 0.24.0 is here"
    assert report["problems"] == ([made] if fault else [])


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
        f"verl cannot be imported: RuntimeError: {stale}, raised in torch. Where it fails: python -c 'import verl'"
    ]
    assert report["verl"] == {"version": "0.9.1", "shim": "v0_9", "supported": True}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"VERL_FL_DEVICE": "gpu"}, "VERL_FL_DEVICE='gpu': allowed is one of 'auto', 'cpu'"),
        ({"VERL_FL_DISABLE": "nothing.such"}, "VERL_FL_DISABLE names hooks that do not exist for this verl"),
        ({"VERL_FL_OPS": "mm", "TRAINING_FL_FLAGOS_WHITELIST": "mm"}, "both choose training's operators"),
        ({"FLAGCX_PATH": "/nowhere", "VERL_FL_STRICT": "1"}, "VERL_FL_STRICT=1, and these settings do not do"),
        ({"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay,broken"}, "OSError: no libthis.so, raised in broken"),
    ],
)
def test_what_keeps_the_overlay_off_is_not_said_of_verl(site, environment, said):
    write(site, "broken", "raise OSError('no libthis.so')")
    status, report, _ = doctor(site, {**CPU, **environment})
    assert status == 1
    assert report["verl"] == {"version": "0.9.1", "shim": "v0_9", "supported": True}
    assert said in "\n".join(report["problems"])
    variables = [text.partition("=")[0].partition(":")[0].partition(" ")[0] for text in report["problems"]]
    assert len(set(variables)) == len(variables), "each setting is told once"
    report.update({"versions": {}, "overlay folder": "x"})
    assert "NOT SUPPORTED" not in as_text(report)


@pytest.mark.parametrize("missing", [{}, {"a_need": "raise OSError('libcudart.so: cannot open')"}])
def test_a_verl_that_needs_what_is_missing_or_broken_is_supported(site, missing):
    for module, code in missing.items():
        write(site, module, code)
    (site / "verl" / "__init__.py").write_text("__version__ = '0.9.1'\nimport a_need")
    status, report, _ = doctor(site, CPU)
    assert status == 1
    assert report["verl"] == {"version": "0.9.1", "shim": "v0_9", "supported": True}
    assert "verl cannot be imported" in report["problems"][0]
    assert "a_need" in report["problems"][0]


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
    for folder in ("none/reports", "reports", "reports"):
        status, report, _ = doctor(site, {**CPU, "VERL_FL_REPORT_DIR": str(site / folder)})
        assert (status, report["problems"]) == (0, [])
        assert not (site / "none").exists()
        (site / "reports").mkdir(exist_ok=True)
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


VERL_NEEDS = "Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\nRequires-Dist: numpy>=2\nRequires-Dist: tensordict\n"


def needs(site: Path, numpy: str, packaging: str = "25.0") -> None:
    """Let the fabricated verl need numpy 2 and a tensordict, which needs a packaging that is older than 26."""
    (site / "verl-0.9.1.dist-info" / "METADATA").write_text(VERL_NEEDS)
    write(site, "numpy", "", numpy)
    write(site, "tensordict", "", "0.10.0", requires="Requires-Dist: packaging<26\nRequires-Dist: a-package\n")
    write(site, "a_package", "", "3.0")
    shutil.copytree(Path(packaging_module.__file__).parent, site / "packaging")  # the real one, of another version
    write(site, "packaging", (site / "packaging" / "__init__.py").read_text(), packaging)


def test_requirements_that_are_met_are_not_told(site):
    needs(site, "2.2.6")
    status, report, _ = doctor(site, CPU)
    assert (status, report["problems"], report["notes"]) == (0, [], [])


def test_a_requirement_of_verl_that_somebody_broke_is_a_problem_with_the_way_out(site):
    needs(site, "1.26.4")
    status, report, _ = doctor(site, CPU)
    assert status == 1
    told = problem(report, "verl 0.9.1 asks for numpy>=2, and numpy 1.26.4 is here. Put it right with: pip install ")
    _, _, option, file, asked = shlex.split(told.partition("right with: ")[2])
    assert (option, asked) == ("-c", "numpy>=2")
    assert "numpy==2.2.6" in Path(file).read_text().split()


def test_what_verl_needs_through_another_is_a_note(site):
    needs(site, "2.2.6", packaging="26.1")
    status, report, _ = doctor(site, CPU)
    assert (status, report["problems"]) == (0, [])
    assert report["notes"] == ["tensordict 0.10.0 asks for packaging<26, and packaging 26.1 is here"]


def test_a_requirement_that_is_missing_is_a_note(site):
    needs(site, "2.2.6")
    shutil.rmtree(site / "a_package-3.0.dist-info")
    status, report, _ = doctor(site, CPU)
    assert (status, report["problems"]) == (0, [])
    assert report["notes"] == ["tensordict 0.10.0 asks for a-package, and it is not installed"]


@pytest.mark.parametrize(("version", "known"), [("5.0.2", True), ("5.3.4", False)])
def test_what_the_hint_leaves_unmet_is_a_note(site, version, known):
    """The fabricated FlagGems cannot be used on a CPU; what its metadata ask for is told all the same."""
    needs(site, "2.2.6")
    write(site, "flag_gems", "raise RuntimeError('no chip')", version, requires="Requires-Dist: numpy==1.26.4\n")
    _, report, _ = doctor(site, GEMS)
    told = f"flag_gems {version} asks for numpy==1.26.4, and numpy 2.2.6 is here"
    assert (told in report["notes"], told in report["problems"]) == (known, not known)
    _, report, _ = doctor(site, CPU)  # nobody asks for FlagGems
    assert told not in report["notes"] + report["problems"]


def test_a_torch_that_was_built_for_numpy_1(site):
    torch(site, devices=1)
    (site / "torch-2.11.0.dist-info").rename(site / "torch-2.2.2.dist-info")
    metadata = site / "torch-2.2.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("2.11.0", "2.2.2"))
    write(site, "numpy", "", "2.2.6")
    _, report, _ = doctor(site, CPU)
    assert problem(report, "torch 2.2.2 is made for numpy<2 (").endswith(", and numpy 2.2.6 is here")


def test_a_note_is_no_problem(site):
    status, report, _ = doctor(site, {**CPU, "VERL_FL_PROFILE": "x.json"})
    assert (status, report["problems"]) == (0, [])
    (note,) = report["notes"]
    assert note.startswith("VERL_FL_PROFILE='x.json' is a relative path")


def test_what_training_would_refuse_later_is_told(site):
    write(site, "flag_gems", '_FULL_CONFIG = (\n    ("mm", mm),\n)\n', "5.3.4")
    status, report, _ = doctor(site, {**GEMS, "VERL_FL_OPS": "bogus"})
    assert status == 1
    assert "'bogus'" in problem(report, "VERL_FL_OPS names operators that FlagGems 5.3.4 does not offer here")
