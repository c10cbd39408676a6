"""Profiles: written and read back, refused when damaged or of another chip, and asked in their place."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace

import pytest

from verl_fl_overlay.cli import tune
from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.flaggems import choice, profile
from verl_fl_overlay.flaggems.profile import Key, Measurement, Profile, ProfileError
from verl_fl_overlay.settings import Settings

HERE = Key("Chip 1", "2.11.0", "3.6.0", "5.0.0")
MEASURED = Profile(
    HERE,
    "a model",
    (
        Measurement("add.Tensor", "add", 10, 2.0, 1.0),
        Measurement("mul.Tensor", "mul", 10, 1.0, 2.0),
        Measurement("pad", "pad", 1, 0.0, 0.0, "cuts the gradient"),
    ),
    ("add",),
    {"native": 10.0, "chosen": 9.0},
)


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "key_here", lambda: HERE)
    monkeypatch.setattr(profile, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    return tmp_path


def test_a_profile_is_read_back_as_it_was_written(tmp_path):
    MEASURED.save(tmp_path / "p.json")
    assert profile.load(tmp_path / "p.json") == MEASURED
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_faster_means_by_more_than_noise():
    assert [one.faster for one in MEASURED.measurements] == [True, False, False]
    assert not Measurement("a", "a", 1, 1.0, 0.97).faster


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("key"),
        lambda d: d.update(format=9),
        lambda d: d["key"].update(more=1),
        lambda d: d.update(chosen="mm"),
        lambda d: d.update(chosen=[1]),
    ],
)
def test_a_damaged_profile_is_refused_with_the_way_out(tmp_path, damage):
    file = tmp_path / "p.json"
    MEASURED.save(file)
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"p\.json is damaged: .*verl-fl tune MODEL"):
        profile.load(file)


def test_half_a_file_and_no_file_are_refused(tmp_path):
    for text in ('{"format": 1, "key', "[" * 100_000):
        (tmp_path / "half.json").write_text(text)
        with pytest.raises(ProfileError, match="damaged"):
            profile.load(tmp_path / "half.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        profile.load(tmp_path / "none.json")


OTHERS = [replace(HERE, **{name: "another"}) for name in vars(HERE)]
each_other = pytest.mark.parametrize("other", OTHERS, ids=list(vars(HERE)))


@each_other
def test_a_profile_of_another_chip_or_of_other_versions_is_refused_with_both_keys(here, other):
    replace(MEASURED, key=other).save(here / "p.json")
    with pytest.raises(ProfileError) as error:
        profile.find(str(here / "p.json"))
    assert f"it holds for: {other}\n" in str(error.value)
    assert f"this is:      {HERE}\n" in str(error.value)
    assert "verl-fl tune" in str(error.value)


def test_a_profile_that_was_not_finished_does_not_stand_for_routing_nothing(here):
    replace(MEASURED, chosen=(), step_ms={}).save(here / "p.json")
    with pytest.raises(ProfileError, match=r"p\.json is not finished.*verl-fl tune MODEL --out .*p\.json"):
        profile.find(str(here / "p.json"))


@each_other
def test_auto_takes_a_shipped_profile_that_fits_and_no_other(here, other):
    assert profile.find("auto") is None
    replace(MEASURED, key=other).save(here / "shipped" / "a.json")
    assert profile.find("auto") is None
    MEASURED.save(here / "shipped" / "b.json")
    assert profile.find("auto") == (MEASURED, "shipped profile b")
    assert profile.find("") is None


@pytest.mark.parametrize(("field", "package"), [("torch", "torch"), ("triton", "triton"), ("flag_gems", "flag-gems")])
def test_the_key_is_of_what_is_installed(field, package):
    pytest.importorskip("torch")
    try:
        installed = importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    assert getattr(profile.key_here(), field) == installed


class Chip:
    """torch's module of an accelerator that may not be there, which some releases name all the same."""

    def __init__(self, there):
        self.is_available = lambda: there

    def get_device_name(self):
        assert self.is_available()
        return "Chip 1"


@pytest.mark.parametrize(("there", "name"), [(True, "Chip 1"), (False, "cpu")])
def test_a_torch_built_for_a_chip_that_is_not_there_means_the_cpu(monkeypatch, there, name):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_device_module", lambda: Chip(there))
    profile.key_here.cache_clear()
    assert profile.key_here().chip == name
    profile.key_here.cache_clear()


def test_a_list_comes_before_a_profile_and_a_profile_before_everything(here, monkeypatch):
    MEASURED.save(here / "p.json")
    monkeypatch.setattr(choice.names, "check", lambda *rest: None)
    settings = Settings.of(profile=str(here / "p.json"))
    found = next(c for source in choice.SOURCES if (c := source(settings, None)) is not None)
    assert found.names == ("add",)
    listed = Settings.of(profile=str(here / "p.json"), ops=("mul",))
    found = next(c for source in choice.SOURCES if (c := source(listed, None)) is not None)
    assert found.names == ("mul",)


def test_the_table_says_what_was_chosen_and_why_not():
    lines = tune.as_text(MEASURED)
    assert lines[0].startswith("Chip 1, torch 2.11.0")
    rows = {line.split()[0]: line for line in lines}
    assert rows["add.Tensor"].endswith("yes")
    assert rows["mul.Tensor"].endswith("no")
    assert rows["pad"].endswith("cuts the gradient")
    assert "whole step, chosen: 9.0 ms" in lines


def test_the_variable_means_auto_nothing_or_a_file(tmp_path):
    def read(text):
        return Settings.from_environment({"VERL_FL_PROFILE": text}).profile

    assert [read(text) for text in ("auto", "", "0", "none", "/a/b.json")] == ["auto", "auto", "", "", "/a/b.json"]
    with pytest.raises(SettingsError, match="directory"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "value"), [("auto", ("auto",)), ("1", ("auto",)), ("0", ()), ("none", ()), ("rotary, RMS_norm", None)]
)
def test_the_fused_variable(text, value):
    found = Settings.from_environment({"VERL_FL_FUSED": text}).fused
    assert found == (value if value is not None else ("rotary", "rms_norm"))


def test_an_unknown_kind_of_fused_module_is_refused():
    with pytest.raises(SettingsError, match="VERL_FL_FUSED='layer_norm': allowed is auto, 0, or some of rms_norm"):
        Settings.from_environment({"VERL_FL_FUSED": "layer_norm"})


def test_every_shipped_profile_can_be_read_and_names_its_chip():
    files = list(profile.SHIPPED.glob("*.json"))
    assert files
    for file in files:
        shipped = profile.load(file)
        assert shipped.key.chip
        assert len(shipped.measurements) > 10
        assert shipped.step_ms["native"] > 0
        assert set(shipped.chosen) <= {one.name for one in shipped.measurements}
