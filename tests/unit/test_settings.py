from __future__ import annotations

import pytest

from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.table import misspelt


def test_nothing_set():
    assert Settings.from_environment({}) == Settings()


def test_values():
    read = Settings.from_environment(
        {"VERL_FL_DISABLE": " a, b,,a ", "VERL_FL_STRICT": "Yes", "VERL_FL_DEVICE": "CPU", "VERL_FL_REPORT_DIR": "/r"}
    )
    assert (read.disable, read.strict, read.device, read.report_dir) == (("a", "b"), True, "cpu", "/r")


def test_all_problems_at_once():
    with pytest.raises(SettingsError) as raised:
        Settings.from_environment({"VERL_FL_DEVICE": "tpu", "VERL_FL_STRICT": "maybe"})
    text = str(raised.value)
    assert "VERL_FL_DEVICE='tpu': allowed is one of 'auto', 'cpu'" in text
    assert "VERL_FL_STRICT='maybe'" in text


def test_misspelt_names_the_nearest():
    assert misspelt({"VERL_FL_DISABEL": "x", "HOME": "/"}) == [
        "VERL_FL_DISABEL is not a variable of verl-fl-overlay; VERL_FL_DISABLE?"
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("", "all"), (" All", "all"), ("AUTO", "auto"), ("none", 0), ("0", 0), ("12", 12)]
)
def test_how_many_layers_recompute(text, value):
    assert Settings.from_environment({"VERL_FL_RECOMPUTE": text}).recompute == value
