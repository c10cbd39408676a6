"""The command line itself: its version, its defaults, and a line where a traceback would say no more."""

from __future__ import annotations

import sys

import pytest

from verl_fl_overlay import __version__
from verl_fl_overlay.cli import main, model_folder


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"verl-fl-overlay {__version__}\n"


@pytest.mark.parametrize(
    ("command", "default"), [("tune", "profile.json"), ("tune", "1024"), ("warmup", "1024"), ("parity", "256")]
)
def test_help_tells_the_defaults(command, default, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"(default: {default})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["parity", "warmup", "tune"])
def test_without_torch_a_line_tells_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "verl_fl_overlay.flaggems.tuning.tune", raising=False)
    monkeypatch.setattr(model_folder, "checked", lambda trial: trial)
    assert main([command, str(tmp_path)]) == 2
    said = "torch is not installed: install the build for your chip (NVIDIA's: pip install torch)"
    assert capsys.readouterr().err.endswith(f"verl-fl {command}: {said}\n")


def test_another_missing_module_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl_fl_overlay.cli.parity", None)
    monkeypatch.delattr("verl_fl_overlay.cli.parity", raising=False)
    with pytest.raises(ModuleNotFoundError):
        main(["parity", str(tmp_path)])
