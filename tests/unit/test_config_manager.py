"""The names of the earlier plugins give the answers of Settings."""

from __future__ import annotations

import sys

import pytest

from verl_fl_overlay.config_manager import FLEnvManager, may_enable_flag_gems
from verl_fl_overlay.settings import TABLE


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)


def test_nothing_set():
    assert not FLEnvManager.is_fl_enabled()
    assert FLEnvManager.get_summary() == "FL[disabled]"
    assert FLEnvManager.get_training_whitelist() is None
    assert FLEnvManager.get_env_snapshot() == {}


def test_everything_set(monkeypatch):
    values = {
        "TE_FL_PREFER": "flagos",
        "VLLM_FL_PREFER": "flagos",
        "USE_FLAGGEMS": "1",
        "USE_FLAGCX": "true",
        "TRAINING_FL_FLAGOS_WHITELIST": "mm, softmax",
        "VLLM_FL_FLAGOS_BLACKLIST": "copy_",
    }
    for name, text in values.items():
        monkeypatch.setenv(name, text)
    assert FLEnvManager.is_training_fl_enabled()
    assert FLEnvManager.is_rollout_fl_enabled()
    assert FLEnvManager.is_flaggems_enabled()
    assert FLEnvManager.is_flagcx_enabled()
    assert FLEnvManager.get_training_whitelist() == ["mm", "softmax"]
    assert FLEnvManager.get_rollout_blacklist() == ["copy_"]
    assert FLEnvManager.get_summary() == "FL[training(TE_FL=flagos), rollout(VLLM_FL=flagos), FlagGems, FlagCX]"
    assert FLEnvManager.get_env_snapshot() == values
    assert "VLLM_FL_PREFER" not in FLEnvManager.get_env_snapshot("training")


def test_trainings_own_switch_goes_first(monkeypatch):
    monkeypatch.setenv("USE_FLAGGEMS", "1")
    monkeypatch.setenv("TRAINING_FL_FLAGGEMS_ENABLE", "0")
    assert not FLEnvManager.is_flaggems_enabled()


def test_enabling_by_hand_does_not_import_flaggems():
    may_enable_flag_gems(phase="training")
    assert "flag_gems" not in sys.modules
