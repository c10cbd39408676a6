"""Activation in processes of their own, on made-up verls."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from processes import output, python, run

from verl_fl_overlay import compat

INIT = """
import importlib, os
__version__ = {version!r}
modules = os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
for name in modules.split(",") if modules else ():
    importlib.import_module(name)
"""


def hooked(version: str) -> set[str]:
    """Return the modules of verl that the hooks of ``version`` are put on."""
    hooks = compat.select(compat.InstalledVerl(version, "")).hooks
    return {hook.module for hook in hooks if hook.module.startswith("verl.")}


HOOKED = hooked(compat.RELEASES[-1])
NAMED = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}
CPU = {"VERL_FL_DEVICE": "cpu"}
"""So that doctor does not miss an accelerator where torch is installed."""


@pytest.fixture
def verl(tmp_path: Path):
    """Return a function that makes a package ``verl`` of any version, with empty modules, and gives its environment.

    Where it is not told which modules, a release has all of those that are hooked, and another version none.
    """

    def make(version: str, modules: Iterable[str] | None = None) -> dict[str, str]:
        if modules is None:
            modules = hooked(version) if version in compat.RELEASES else ()
        (tmp_path / "verl" / "version").mkdir(parents=True)
        (tmp_path / "verl" / "version" / "version").write_text(version)
        (tmp_path / "verl" / "__init__.py").write_text(INIT.format(version=version))
        for module in modules:
            file = tmp_path / f"{module.replace('.', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return {"PYTHONPATH": str(tmp_path)}

    return make


def test_too_old_verl_stops_its_import(verl):
    done = python("import verl", env={**verl("0.6.1"), **NAMED})
    assert done.returncode == 1
    assert "UnsupportedVerlError: verl 0.6.1 is here; verl-fl-overlay needs verl >= 0.7.0" in done.stderr


def test_too_old_verl_in_doctor(verl):
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env={**verl("0.6.1"), **NAMED})
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["verl"] == {"version": "0.6.1", "shim": None, "supported": False}
    assert "needs verl >= 0.7.0" in report["problems"][0]
    assert not any(hook["state"] == "installed" for hook in report["hooks"])


def test_unreadable_version_in_doctor(verl):
    done = run("-m", "verl_fl_overlay", "doctor", env=verl("banana"))
    assert done.returncode == 1
    assert "verl says its version is 'banana'" in done.stdout, done.stderr


def test_no_verl_at_all(tmp_path):
    (tmp_path / "verl.py").write_text("raise ModuleNotFoundError(\"No module named 'verl'\", name='verl')")
    done = run("-m", "verl_fl_overlay", "doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "verl cannot be imported" in done.stdout
    assert "verl-fl install-hint verl" in done.stdout
    assert python("import verl_fl_overlay", env={}).returncode == 0, "importing it alone does nothing"


def test_found_by_entry_point_it_says_why_it_stays_off(verl, tmp_path):
    # As verl does with what plugins raise.
    (tmp_path / "plugins.py").write_text("try:\n    import verl_fl_overlay\nexcept Exception:\n    pass")
    done = python("import verl", env={**verl("0.6.1"), "VERL_USE_EXTERNAL_MODULES": "plugins"})
    assert done.returncode == 0, done.stderr
    assert "verl-fl-overlay is installed and stays off: verl 0.6.1 is here" in done.stderr


def test_newer_verl_is_warned_about_once(verl):
    program = (
        "import verl, verl_fl_overlay; from verl_fl_overlay import activation as a; print(a.activate() is a.active())"
    )
    done = python(program, env={**verl("0.11.0", HOOKED), **NAMED})
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr.count("newer than any release") == 1


def test_newer_verl_without_a_required_hooks_module_is_refused(verl):
    env = {**verl("0.11.0", HOOKED - {"verl.workers.engine.base"}), **NAMED}
    done = python("import verl", env=env)
    assert done.returncode == 1
    said = "on verl.workers.engine.base:EngineRegistry.new: verl 0.11.0 has no module verl.workers.engine.base."
    assert f"HookError: hook 'engine.new' cannot be put {said}" in done.stderr
    asked = "engine.new,engine.enter,engine.exit,engine.train_batch,engine.infer_batch"
    assert python("import verl", env={**env, "VERL_FL_DISABLE": asked}).returncode == 0


def test_newer_verl_without_an_optional_hooks_module_is_warned_about_or_strictly_refused(verl):
    env = {**verl("0.11.0", HOOKED - {"verl.utils.model"}), **NAMED}
    done = python("import verl", env=env)
    assert done.returncode == 0
    assert done.stderr.count("verl 0.11.0 has no module verl.utils.model") == 1
    strict = python("import verl", env={**env, "VERL_FL_STRICT": "1"})
    assert strict.returncode == 1
    assert "HookError: hook 'attention.value_model' cannot be put on" in strict.stderr


def test_a_release_whose_modules_were_moved_is_treated_like_a_newer_verl(verl):
    moved = {"verl.workers.engine.base", "verl.utils.model"}
    env = {**verl("0.9.1", HOOKED - moved), **NAMED}
    done = python("import verl", env=env)
    assert done.returncode == 1
    assert "HookError: hook 'engine.new' cannot be put on" in done.stderr
    assert "verl 0.9.1 has no module verl.workers.engine.base." in done.stderr
    asked = "engine.new,engine.enter,engine.exit,engine.train_batch,engine.infer_batch,chip.engine_class"
    done = python("import verl", env={**env, "VERL_FL_DISABLE": asked})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("verl 0.9.1 has no module verl.utils.model") == 1


@pytest.mark.parametrize("version", ["0.11.0", "0.9.1"])
@pytest.mark.parametrize("installed", ["nothing", "nemo_automodel"])
def test_verl_without_an_engine_that_needs_a_package(verl, tmp_path, installed, version):
    env = {**verl(version, HOOKED - {"verl.workers.engine.automodel.transformer_impl"}), **NAMED}
    (tmp_path / "more" / installed).mkdir(parents=True)
    (tmp_path / "more" / installed / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path / "more"), env.get("PYTHONPATH", "")])
    done = python("import verl", env={**env, "VERL_FL_STRICT": "1", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    told = "has no module verl.workers.engine.automodel.transformer_impl; an engine of nemo_automodel goes without it"
    assert done.stderr.count(told) == (installed == "nemo_automodel")
    program = """
    import verl
    from verl_fl_overlay import activation
    told = {s.hook.name: s.state.value for s in activation.active().hooks.report() if "automodel" in s.hook.name}
    print(told)"""
    said = output(program, env={**env, "PYTHONPATH": path})
    names = ("engine.initialize.automodel", "logprobs.automodel", "entropy.automodel")
    assert ast.literal_eval(said) == dict.fromkeys(names, "disabled")


def test_refused_settings_refuse_every_import_until_they_are_mended(verl):
    program = """
    import os, verl_fl_overlay
    from verl_fl_overlay import activation
    for _ in range(2):
        try:
            import verl
        except verl_fl_overlay.SettingsError:
            assert activation.active() is None
        else:
            raise SystemExit("imported")
    del os.environ["VERL_FL_SCOPE"]
    import verl
    print(activation.active() is not None)"""
    assert output(program, env={**verl("0.9.1"), "VERL_FL_SCOPE": "bogus"}) == "True"


def test_a_refusal_is_over_when_its_advice_was_followed(verl):
    program = """
    import os, verl, verl.workers.engine.fsdp.transformer_impl
    try:
        import verl_fl_overlay
    except RuntimeError as error:
        assert "VERL_FL_DISABLE=engine.initialize.fsdp" in str(error)
    os.environ["VERL_FL_DISABLE"] = "*"
    from verl_fl_overlay import activation
    import verl.workers.engine.base
    print(activation.active() is not None)"""
    assert output(program, env=verl("0.9.1", HOOKED)) == "True"


def test_packages_made_by_hand_do_not_stop_verl(verl):
    program = """
    import sys, types
    for name in ("transformer_engine", "megatron", "triton", "torch_npu"):
        sys.modules[name] = types.ModuleType(name)
    import verl
    from verl_fl_overlay import activation
    from verl_fl_overlay.devices import chips
    features = activation.report()["features"]
    print(chips.find({})[1], features["fused"]["on"], features["te_fl"]["on"], sep=", ")"""
    assert output(program, env={**verl("0.9.1"), **NAMED}) == "torch_npu is installed, True, False"


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (",verl_fl_overlay", "ValueError: Empty module name"),
        (" json,verl_fl_overlay", "ModuleNotFoundError: No module named ' json'"),
    ],
)
def test_doctor_tells_what_stops_verl_and_what_is_wrong_beside_it(verl, listed, said):
    env = {**verl("0.9.1"), **CPU, "VERL_USE_EXTERNAL_MODULES": listed, "USE_FLAGCX": "maybe", "VERL_FL_STRCT": "1"}
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env=env)
    assert done.returncode == 1, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert problems[0] == f"verl cannot be imported: {said}. Where it fails: python -c 'import verl'"
    named = ["USE_FLAGCX", "VERL_FL_STRCT", "VERL_USE_EXTERNAL_MODULES"]
    assert [problem.split(" ")[0].split("=")[0] for problem in problems[1:]] == named


@pytest.mark.parametrize(
    ("version", "environment", "loaded"),
    [
        ("0.8.0", {}, False),
        ("0.8.0", NAMED, True),
        ("0.9.1", {}, True),
        ("0.9.1", {"VERL_USE_EXTERNAL_PLUGINS": "None"}, False),
        ("0.9.1", {"VERL_USE_EXTERNAL_PLUGINS": "other, verl_fl_overlay"}, True),
    ],
)
def test_doctor_says_where_verl_would_not_load_the_overlay(verl, version, environment, loaded):
    env = {**verl(version), **CPU, **environment, "VERL_FL_DISABLE": "*"}
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env=env)
    said = f"verl {version} does not load the overlay in training: export VERL_USE_EXTERNAL_MODULES=verl_fl_overlay"
    assert json.loads(done.stdout)["problems"] == ([] if loaded else [said])
    assert done.returncode == int(not loaded)


def test_doctor_does_not_condemn_a_module_of_the_user_s_that_may_import_the_overlay(verl, tmp_path):
    (tmp_path / "mysetup.py").write_text("import verl_fl_overlay")
    env = {**verl("0.8.0"), **CPU}
    path = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    env = {**env, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "mysetup", "VERL_FL_DISABLE": "*"}
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env=env)
    assert done.returncode == 0
    (said,) = json.loads(done.stdout)["problems"]
    assert "unless mysetup imports it: export VERL_USE_EXTERNAL_MODULES=mysetup,verl_fl_overlay" in said


def test_misspelt_variable_is_warned_about(verl):
    done = python("import verl", env={**verl("0.9.1"), **NAMED, "VERL_FL_STRCT": "1"})
    assert done.returncode == 0
    assert "VERL_FL_STRCT is not a variable of verl-fl-overlay; VERL_FL_STRICT?" in done.stderr


REPORTS = """
import verl
from verl_fl_overlay import files
from verl_fl_overlay.phase import training
files.INTERVAL = 3600.0  # a machine that is slow enough takes more than a second for one report
import os, json, glob
folder = os.environ["VERL_FL_REPORT_DIR"]
def written(): return [json.load(open(f)) for f in glob.glob(folder + "/*")]
for _ in range(50):
    with training.inside("train"):
        pass
first = written()
print(json.dumps([len(first), first[0]["phase"]["counts"], os.getpid() == first[0]["process"]["pid"]]))
"""


def test_report_at_most_once_an_interval_and_at_exit(verl, tmp_path):
    folder = tmp_path / "made" / "for it"
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_REPORT_DIR": str(folder)}
    assert json.loads(output(REPORTS, env=env)) == [1, {"train": 1}, True]
    (file,) = folder.iterdir()
    report = json.loads(file.read_text())
    assert report["phase"]["counts"] == {"train": 50}, "written again at exit"
    keys = ["overlay", "verl", "torch", "device", "hooks", "settings", "features", "problems"]
    assert [key for key in report if key in keys] == keys
    assert set(report["hooks"][0]) >= {"name", "target", "feature", "required", "state", "calls", "why"}


def test_a_process_that_is_killed_before_it_trains_has_reported(verl, tmp_path):
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_REPORT_DIR": str(tmp_path / "reports"), "RANK": "1"}
    done = python("import os, verl; os.kill(os.getpid(), 9)", env={**env, "FLAGCX_HOSTID": "a", "TE_FL_NEW": "1"})
    assert done.returncode == -9
    (file,) = (tmp_path / "reports").iterdir()
    report = json.loads(file.read_text())
    assert report["process"]["rank"] == "1"
    assert report["process"]["program"] == "-c"
    told = report["features"]["ray"]["detail"]
    assert told["forwarded"] == ["TE_FL_NEW", "VERL_FL_REPORT_DIR", "VERL_USE_EXTERNAL_MODULES"]
    assert told["kept back"] == {"FLAGCX_HOSTID": "it differs between processes"}


def test_a_report_starts_no_accelerator(verl, tmp_path):
    (tmp_path / "torch.py").write_text(
        "__version__ = '2'\nclass cuda:\n    is_initialized = lambda: started\n    device_count = lambda: 2\n"
        "    def is_available(): raise SystemExit('asked CUDA')\nstarted = False"
    )
    program = """
    import torch, verl
    from verl_fl_overlay.activation import report
    first = report()["device"]
    torch.started = True
    print(first, report()["device"], sep="; ")"""
    env = {**verl("0.9.1"), **NAMED, "GEMS_VENDOR": "nvidia", "VERL_FL_REPORT_DIR": str(tmp_path / "reports")}
    assert output(program, env=env) == "not known: torch has not started an accelerator; 2 x cuda"


def test_a_report_that_a_feature_spoils_does_not_stop_verl(verl, tmp_path):
    program = """
    from verl_fl_overlay import activation, features
    features.Features.describe = lambda *_: 1 / 0
    import verl
    features.Features.describe = lambda *_: {}
    print(activation.active() is not None)"""
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_REPORT_DIR": str(tmp_path / "reports")}
    done = python(program, env={**env, "VERL_USE_EXTERNAL_MODULES": ""})
    assert done.stdout.strip() == "True", done.stderr
    assert "the report of this process failed and is skipped" in done.stderr


def test_report_folder_that_is_a_file(verl, tmp_path):
    (tmp_path / "taken").write_text("")
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_REPORT_DIR": str(tmp_path / "taken")}
    program = """
    import verl
    from verl_fl_overlay.phase import training
    for _ in range(3):
        with training.inside("train"):
            pass"""
    done = python(program, env=env)
    assert done.returncode == 0
    assert done.stderr.count("cannot be written") == 1


def test_reports_go_on_once_the_full_disk_has_room(verl, tmp_path):
    """The report there names no fault that is over."""
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_REPORT_DIR": str(tmp_path / "reports")}
    program = """
    import json
    from pathlib import Path
    import verl
    from verl_fl_overlay import activation, files
    from verl_fl_overlay.phase import training
    files.INTERVAL = 0
    (file,) = Path(activation.active().settings.report_dir).iterdir()
    full = file.with_name(file.name + ".tmp")
    for phase in range(4):
        if phase in (1, 2):
            full.symlink_to("/dev/full")
        with training.inside("train"):
            pass
        report = json.loads(file.read_text())
        print(report["phase"]["counts"], report["problems"], full.exists())"""
    done = python(program, env=env)
    assert done.stdout.splitlines() == [f"{{'train': {counted}}} [] False" for counted in (1, 1, 1, 4)], done.stderr
    assert done.stderr.count("cannot be written") == 1


def test_the_cpu_is_refused_where_verl_has_found_gpus(verl, tmp_path):
    env = {**verl("0.9.1"), **NAMED, "VERL_FL_DEVICE": "cpu"}
    torch = "class cuda: is_available, device_count = (lambda: {}), (lambda: 2)"
    (tmp_path / "torch.py").write_text(torch.format(True))
    done = python("import torch, verl", env=env)
    assert done.returncode == 1
    assert "SettingsError: VERL_FL_DEVICE=cpu, but torch sees 2 CUDA device(s)" in done.stderr
    assert "export CUDA_VISIBLE_DEVICES=" in done.stderr
    (tmp_path / "torch.py").write_text(torch.format(False))
    assert python("import torch, verl", env=env).returncode == 0


def test_deactivated_and_activated_anew(verl):
    program = """
    import os, verl
    from verl_fl_overlay import activation
    activation.deactivate()
    os.environ["VERL_FL_DISABLE"] = "*"
    print({s.state.value for s in activation.activate().hooks.report()})"""
    assert output(program, env={**verl("0.9.1"), **NAMED}) == "{'disabled'}"


def test_features_whose_hooks_are_all_left_out_are_off(verl):
    program = """
    import verl
    from verl_fl_overlay import activation
    print([name for name, feature in activation.report()["features"].items() if feature["on"]])"""
    asked = {**verl("0.9.1"), **NAMED, "USE_FLAGGEMS": "1", "VERL_FL_DEVICE": "cpu"}
    assert "'flaggems'" in output(program, env=asked)
    assert output(program, env={**asked, "VERL_FL_DISABLE": "*"}) == "[]"


@pytest.mark.parametrize(("named", "taken"), [("engine.enter", "engine.exit"), ("engine.exit", "engine.enter")])
def test_entering_and_leaving_are_left_out_together(verl, named, taken):
    program = """
    import verl
    from verl_fl_overlay import activation
    hooks = activation.active().hooks.report()
    print({s.hook.name: s.detail for s in hooks if s.hook.feature == "phase" and s.state.value == "disabled"})"""
    told = ast.literal_eval(output(program, env={**verl("0.9.1"), **NAMED, "VERL_FL_DISABLE": named}))
    assert told == {
        named: "left out by VERL_FL_DISABLE",
        taken: f"left out with {named}, which VERL_FL_DISABLE names",
    }
