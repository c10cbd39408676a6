"""Activation in processes of their own, on made-up verls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import output, python, run

INIT = """
import importlib, os
__version__ = {version!r}
for name in filter(None, os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")):
    importlib.import_module(name)
"""
NAMED = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}


@pytest.fixture
def verl(tmp_path: Path):
    """Return a function that makes an importable package ``verl`` of any version and gives its environment."""

    def make(version: str) -> dict[str, str]:
        (tmp_path / "verl" / "version").mkdir(parents=True)
        (tmp_path / "verl" / "version" / "version").write_text(version)
        (tmp_path / "verl" / "__init__.py").write_text(INIT.format(version=version))
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


def test_no_verl_at_all(tmp_path):
    (tmp_path / "verl.py").write_text("raise ModuleNotFoundError(\"No module named 'verl'\", name='verl')")
    done = run("-m", "verl_fl_overlay", "doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "verl cannot be imported" in done.stdout
    assert "pip install verl" in done.stdout
    assert python("import verl_fl_overlay", env={}).returncode == 0, "importing it alone does nothing"


def test_found_by_entry_point_it_says_why_it_stays_off(verl):
    program = """
    import verl
    try:
        import verl_fl_overlay
    except RuntimeError:
        pass  # as verl does with what plugins raise
    """
    done = python(program, env=verl("0.6.1"))
    assert done.returncode == 0
    assert "verl-fl-overlay is installed and stays off: verl 0.6.1 is here" in done.stderr


def test_newer_verl_is_warned_about_once(verl):
    program = (
        "import verl, verl_fl_overlay; from verl_fl_overlay import activation as a; print(a.activate() is a.active())"
    )
    done = python(program, env={**verl("0.11.0"), **NAMED})
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr.count("newer than any release") == 1


def test_misspelt_variable_is_warned_about(verl):
    done = python("import verl", env={**verl("0.9.1"), **NAMED, "VERL_FL_STRCT": "1"})
    assert done.returncode == 0
    assert "VERL_FL_STRCT is not a variable of verl-fl-overlay; VERL_FL_STRICT?" in done.stderr


REPORTS = """
import verl
from verl_fl_overlay import report
from verl_fl_overlay.phase import training
report.INTERVAL = 3600.0  # a machine that is slow enough takes more than a second for one report
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
