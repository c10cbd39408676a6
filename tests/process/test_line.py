"""The line that a process with verl and the overlay says what it runs with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sft import without_images

import verl_fl_overlay

pytest.importorskip("torch")
verl = pytest.importorskip("verl")


def import_verl(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: text for name, text in os.environ.items() if name != "VERL_LOGGING_LEVEL"}
    return subprocess.run(
        [sys.executable, "-c", f"import verl; {code}"],
        cwd="/",
        env={
            **own,
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
    code = "import json; from verl_fl_overlay.report import build; print(json.dumps(build()['summary']))"
    done = import_verl(code, VERL_FL_DEVICE="cpu", USE_FLAGGEMS="1", GEMS_VENDOR="metax")
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = lines(done)
    assert line.startswith("INFO:")
    assert f": verl {verl.__version__} (v" in line
    assert "), device cpu, FL[FlagGems], hooks " in line
    assert json.loads(done.stdout.splitlines()[-1]).split(", hooks")[0] in line


def test_the_chip_and_what_told_it_are_named():
    (line,) = lines(import_verl(GEMS_VENDOR="metax"))
    assert "device cuda of metax (GEMS_VENDOR=metax), FL[disabled]" in line


def test_verls_logging_level_silences_it():
    assert lines(import_verl(VERL_LOGGING_LEVEL="WARN")) == []


def test_settings_that_do_not_do_what_they_say_stop_a_strict_process():
    done = import_verl(VERL_FL_STRICT="1", VLLM_FL_PREFER="vendor")
    assert done.returncode == 1
    assert "VERL_FL_STRICT=1, and these settings do not do what they say:" in done.stderr
    assert "VLLM_FL_PREFER=vendor also switches all of FlagGems off in rollout" in done.stderr
