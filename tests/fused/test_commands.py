"""``verl-fl tune --show``, ``--plot`` and ``verl-fl warmup`` as commands."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("torch")

from processes import OVERLAY, run, warm

from verl_fl_overlay.cli import main
from verl_fl_overlay.flaggems.profile import SHIPPED, load


def test_show_prints_the_table_of_a_profile_and_plot_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "profile.json", tmp_path / "steps.png"
    shutil.copy(SHIPPED / "nvidia_h100.json", file)
    assert main(["tune", "--show", "--wide", "--out", str(file), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    profile = load(file)
    assert lines[0] == str(profile.key)
    rows = {line.split()[0]: line.split()[1:4] for line in lines[3 : 3 + len(profile.measurements)]}
    for one in profile.measurements:
        assert rows[one.key] == [str(one.calls), f"{one.native_ms:.3f}", f"{one.flaggems_ms:.3f}"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(picture.read_bytes()) > 10_000


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["tune", "--show", "--out", str(SHIPPED / "nvidia_h100.json"), "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a model's folder is needed"),
        (["--show", "--out", "/nowhere/profile.json"], "cannot be read"),
        (["--show", "model"], "leave the model out"),
    ],
)
def test_tune_without_a_model_or_a_profile_says_so(arguments, said, capsys):
    assert main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err


TUNE = """
import sys, time, torch
from verl_fl_overlay.cli import main
from verl_fl_overlay.flaggems import library
from verl_fl_overlay.flaggems.library import FlagGems, Kernel

def silu(x):
    time.sleep(0.01)
    return x * torch.sigmoid(x)

def embedding(weight, indices, *rest):
    return weight[indices]

kernels = (Kernel("silu", silu, ("CPU",)), Kernel("embedding", embedding, ("CPU",)))
library.load = lambda: FlagGems("5", "x", kernels)
sys.exit(main(["tune", *sys.argv[1:]]))
"""


def test_tune_measures_a_step_of_verl_s_engine(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path / "model")
    file = tmp_path / "profile.json"
    batch = ("--rows", "4", "--length", "16", "--micro-batch", "2", "--out", file)
    routed = {**OVERLAY, "USE_FLAGGEMS": "1", "TRAINING_FL_FLAGGEMS_ENABLE": "1"}  # as the job will have it
    done = warm("-c", TUNE, tmp_path / "model", *batch, "--skip", "embedding", env=routed, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    made = load(file)
    layers = json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"]
    rows = {one.key: one for one in made.measurements}
    assert rows["silu"].calls == 2 * layers
    assert rows["silu"].flaggems_ms >= 2 * layers * 10
    assert rows["silu"].flaggems_ms > 3 * rows["silu"].native_ms > 0
    assert (rows["embedding"].calls, rows["embedding"].note) == (2, "not measured: skipped")
    assert made.chosen == ()
    assert "nothing is routed: nothing made whole steps faster" in done.stderr

    done = warm("-c", TUNE, tmp_path / "model", *batch, "--skip", "silo", env=OVERLAY, timeout=280)
    assert done.returncode == 2
    assert "--skip names operators that FlagGems 5 does not offer here:\n  'silo': " in done.stderr
    assert "silu" in done.stderr
    assert load(file) == made


WARMUP = """
import sys
from verl_fl_overlay.cli import main, warmup

warmup._on_cpu = lambda: ""  # there are no kernels for a CPU, and so nothing to warm there
sys.exit(main(["warmup", *sys.argv[1:], "--rows", "2", "--length", "16"]))
"""


def test_warmup_runs_one_step_of_the_model_with_the_overlay(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path / "model")
    reports = tmp_path / "reports"
    environment = {**OVERLAY, "VERL_FL_REPORT_DIR": str(reports)}
    done = run("-c", WARMUP, tmp_path / "model", env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the kernels it needs are in the caches" in done.stdout
    assert "log-probs: {'cpu, bfloat16" in done.stdout
    told = [json.loads(file.read_text()) for file in reports.iterdir()]
    called = {hook["name"] for report in told for hook in report["hooks"] if hook["calls"]}
    assert {"engine.train_batch", "entropy.fsdp"} <= called


def test_warmup_without_the_overlay_is_an_error(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path / "model")
    without = {"VERL_USE_EXTERNAL_MODULES": "math", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = run("-c", WARMUP, tmp_path / "model", env=without, timeout=280)
    assert done.returncode == 2
    assert "in the caches" not in done.stdout
