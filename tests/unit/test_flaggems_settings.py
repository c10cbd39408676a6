"""The switches of FlagGems in training: who decides, which lists contradict each other, what is no list."""

from __future__ import annotations

import pytest

from verl_fl_overlay import features
from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.settings import Settings


def off(**environment: str) -> str:
    return features.reason_off("flaggems", Settings.from_environment(environment))


def test_the_training_switch_decides_over_the_general_one():
    assert "USE_FLAGGEMS is not set" in off()
    assert off(USE_FLAGGEMS="1") == ""
    assert off(USE_FLAGGEMS="true", TRAINING_FL_FLAGGEMS_ENABLE="0") == "TRAINING_FL_FLAGGEMS_ENABLE=0"
    assert off(USE_FLAGGEMS="0", TRAINING_FL_FLAGGEMS_ENABLE="1") == ""
    assert off(USE_FLAGGEMS="1", VERL_FL_OPS="None") == "VERL_FL_OPS=none"


def test_a_list_without_the_switch_is_not_silent():
    assert "have no effect" in off(TRAINING_FL_FLAGOS_WHITELIST="softmax")


def test_blanks_empty_items_and_repetitions_are_dropped():
    settings = Settings.from_environment({"TRAINING_FL_FLAGOS_WHITELIST": " mm, ,softmax,mm ,"})
    assert settings.flagos_whitelist == ("mm", "softmax")
    assert Settings.from_environment({"TRAINING_FL_FLAGOS_WHITELIST": " "}).flagos_whitelist == ()
    assert Settings.from_environment({"VERL_FL_OPS": ""}).ops == ("auto",)


@pytest.mark.parametrize(
    "environment",
    [
        {"TRAINING_FL_FLAGOS_WHITELIST": "mm", "TRAINING_FL_FLAGOS_BLACKLIST": "mul"},
        {"TRAINING_FL_FLAGOS_WHITELIST": "mm", "VERL_FL_OPS": "mul"},
        {"TRAINING_FL_FLAGOS_WHITELIST": "mm", "VERL_FL_OPS": "all"},
        {"TRAINING_FL_FLAGOS_BLACKLIST": "mm", "VERL_FL_OPS": "none"},
    ],
)
def test_two_lists_are_an_error_that_names_both(environment):
    with pytest.raises(SettingsError) as error:
        Settings.from_environment(environment)
    assert all(name in str(error.value) for name in environment)


def test_a_blacklist_goes_with_all():
    assert Settings.from_environment({"TRAINING_FL_FLAGOS_BLACKLIST": "mm", "VERL_FL_OPS": "all"}).ops == ("all",)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("TRAINING_FL_FLAGOS_WHITELIST", ", ,", "there is none between the commas"),
        ("VERL_FL_OPS", "all,mm", "all alone"),
        ("VERL_FL_SCOPE", "step", "'phase', 'process'"),
        ("USE_FLAGGEMS", "maybe", "one of 1, true"),
    ],
)
def test_what_is_not_allowed_is_said_with_what_is(variable, value, allowed):
    with pytest.raises(SettingsError, match=allowed) as error:
        Settings.from_environment({variable: value})
    assert f"{variable}={value!r}" in str(error.value)


def test_the_record_is_a_file_and_not_a_directory(tmp_path):
    with pytest.raises(SettingsError, match=r"TRAINING_FLAGGEMS_PATH.*this is a directory"):
        Settings.from_environment({"TRAINING_FLAGGEMS_PATH": str(tmp_path)})
    assert Settings.from_environment({"TRAINING_FLAGGEMS_PATH": f"{tmp_path}/ops.txt"}).record == f"{tmp_path}/ops.txt"


def test_all_problems_are_told_at_once():
    with pytest.raises(SettingsError) as error:
        Settings.from_environment(
            {"VERL_FL_SCOPE": "x", "TRAINING_FL_FLAGOS_WHITELIST": "a", "TRAINING_FL_FLAGOS_BLACKLIST": "b"}
        )
    assert "VERL_FL_SCOPE" in str(error.value)
    assert "keep one of them" in str(error.value)
