"""The line that a process with verl and the overlay says what it runs with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from processes import run
from sft import without_images

import verl_fl_overlay

pytest.importorskip("torch")
verl = pytest.importorskip("verl")


def import_verl(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import verl; {code}"],
        cwd="/",
        env={
            **os.environ,
            **without_images(),
            "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if f"verl-fl-overlay {verl_fl_overlay.__version__}: " in line]


def test_one_line_says_what_the_process_runs_with_and_the_report_holds_it():
    code = "import json; from verl_fl_overlay.activation import report as build; print(json.dumps(build()['summary']))"
    done = import_verl(code, VERL_FL_DEVICE="cpu", USE_FLAGGEMS="1", GEMS_VENDOR="metax", RANK="3")
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = lines(done)
    assert line.startswith("INFO:")
    assert f": rank 3, verl {verl.__version__} (v" in line
    assert "), device cpu; on: phase, attention, " in line
    on, _, off = line.partition("; on: ")[2].partition("; hooks: ")[0].partition("; off: ")
    assert {"logprobs", "flaggems"} <= set(on.split(", "))
    assert "fused (there are no kernels for the CPU), recompute (VERL_FL_RECOMPUTE is all)" in off
    assert json.loads(done.stdout.splitlines()[-1]).split("; hooks")[0] in line


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        ({"GEMS_VENDOR": "metax"}, "cuda of metax (GEMS_VENDOR=metax)"),
        ({"VERL_PLATFORM": "XPU"}, "xpu of intel (VERL_PLATFORM=xpu)"),
    ],
)
def test_the_chip_and_what_told_it_are_named(environment, device):
    (line,) = lines(import_verl(**environment))
    assert f": verl {verl.__version__} (v" in line, "no rank where there is none"
    assert f"device {device}; on: phase, " in line
    assert "flaggems (USE_FLAGGEMS is not set)" in line


def test_verls_logging_level_silences_it():
    assert lines(import_verl(VERL_LOGGING_LEVEL="WARN")) == []


def test_settings_that_do_not_do_what_they_say_stop_a_strict_process():
    done = import_verl(VERL_FL_STRICT="1", VLLM_FL_PREFER="vendor")
    assert done.returncode == 1
    assert "VERL_FL_STRICT=1, and these settings do not do what they say:" in done.stderr
    assert "VLLM_FL_PREFER=vendor also switches all of FlagGems off in rollout" in done.stderr


def second_plugin(folder, order: str) -> dict[str, str]:
    (folder / "another.py").write_text("import verl.workers.engine.base")
    return {"PYTHONPATH": str(folder), "VERL_FL_DEVICE": "cpu", "VERL_USE_EXTERNAL_MODULES": order}


LATE = (
    "VERL_FL_DEVICE=cpu comes too late: verl had chosen its device before verl-fl-overlay was loaded. List the overlay "
    "first: VERL_USE_EXTERNAL_MODULES=verl_fl_overlay,another"
)


def test_a_plugin_that_made_verl_choose_its_device_first_is_told(tmp_path):
    done = import_verl(**second_plugin(tmp_path, "another,verl_fl_overlay"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count(LATE) == 1
    strict = import_verl(**second_plugin(tmp_path, "another,verl_fl_overlay"), VERL_FL_STRICT="1")
    assert strict.returncode == 1
    assert LATE in strict.stderr


def test_listed_as_that_says_the_device_is_ours(tmp_path):
    code = "from verl.utils.device import get_nccl_backend; print(get_nccl_backend())"
    done = import_verl(code, **second_plugin(tmp_path, "verl_fl_overlay,another"), VERL_FL_STRICT="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "gloo"


@pytest.mark.parametrize("first", [True, False])
def test_doctor_tells_the_same(tmp_path, first):
    order = "verl_fl_overlay,another" if first else "another,verl_fl_overlay"
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env=second_plugin(tmp_path, order))
    assert json.loads(done.stdout)["problems"] == ([] if first else [LATE])
