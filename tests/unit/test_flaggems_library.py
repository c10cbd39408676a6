"""A FlagGems that cannot be used is refused with what was found and what to do; nothing of it is imported at load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from verl_fl_overlay import events, phase
from verl_fl_overlay.features.flaggems import Routing
from verl_fl_overlay.flaggems import library
from verl_fl_overlay.flaggems.library import FlagGemsError
from verl_fl_overlay.settings import Settings


@pytest.fixture
def no_database(monkeypatch, tmp_path):
    monkeypatch.setattr("verl_fl_overlay.flaggems.database.folder", lambda: tmp_path)
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
    yield
    sys.modules.pop("flag_gems", None)


def a_module(tmp_path, monkeypatch, text: str) -> None:
    (tmp_path / "flag_gems.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(library, "installed_version", lambda: "")


FOUR = """
class Register:
    def __init__(self, config, user_unused_ops_list=None, cpp_patched_ops_list=None, lib=None): pass

def enable(lib=None, unused=None, registrar=Register, record=False, once=False, path=None): pass
"""


@pytest.mark.parametrize("text", [FOUR, "def enable(lib=None): pass"])
def test_one_before_5_is_refused_by_what_its_enable_takes(monkeypatch, tmp_path, no_database, text):
    a_module(tmp_path, monkeypatch, text)
    with pytest.raises(FlagGemsError, match=r"takes no registrar that can be asked.*>= 5\.0\.0.*install-hint flaggems"):
        library.load()


def test_no_flag_gems_no_triton_and_an_unknown_chip_are_told_apart(monkeypatch, tmp_path, no_database):
    a_module(tmp_path, monkeypatch, "import no_such_triton")
    with pytest.raises(FlagGemsError, match="it needs no_such_triton: verl-fl install-hint flaggems"):
        library.load()
    a_module(tmp_path, monkeypatch, "raise RuntimeError('No device were detected on your machine ! ')")
    with pytest.raises(FlagGemsError, match=r"No device were detected.*GEMS_VENDOR names it"):
        library.load()
    (tmp_path / "flag_gems.py").unlink()
    monkeypatch.setattr(sys, "meta_path", [_Nothing, *sys.meta_path])
    with pytest.raises(FlagGemsError, match="FlagGems is not installed: verl-fl install-hint flaggems"):
        library.load()


class _Nothing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flag_gems":
            raise ModuleNotFoundError("No module named 'flag_gems'", name=name)


def test_training_goes_on_natively_after_one_warning_or_stops_when_strict(monkeypatch, caplog):
    tries = []

    def fail():
        tries.append(1)
        raise FlagGemsError("no chip")

    monkeypatch.setattr(library, "load", fail)
    routing = Routing(Settings.of(use_flaggems=True))
    routing.start()
    try:
        for _ in range(3):
            with phase.training.inside("train"):
                pass
        assert len(tries) == 1
        assert sum("no chip" in record.getMessage() for record in caplog.records) == 1
        assert routing.describe()["state"] == "no chip"
        monkeypatch.setattr(events.failures, "strict", True)
        with pytest.raises(FlagGemsError, match="no chip"), phase.training.inside("train"):
            pass
        assert not phase.training.active
    finally:
        routing.stop()
        events.failures.begin(strict=False)


def test_nothing_heavy_is_imported_at_load():
    code = (
        "import sys; import verl_fl_overlay; from verl_fl_overlay.features.flaggems import Routing; from "
        "verl_fl_overlay.settings import Settings; Routing(Settings.of(use_flaggems=True)).start(); "
        "print([m for m in ('torch', 'flag_gems', 'triton', 'sqlalchemy', 'yaml') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert said.strip() == "[]"
