"""The table of FlagGems' known faults: which versions and chips have one, and what a version that cannot be has."""

from __future__ import annotations

import json
import re

import pytest
from packaging.version import Version

from verl_fl_overlay.flaggems import faults, library
from verl_fl_overlay.flaggems.faults import FAULTS, Fault


def test_every_row_says_what_goes_wrong_and_who_showed_it():
    for fault in FAULTS:
        assert fault.what
        assert fault.link.startswith("https://github.com/flagos-ai/")
        assert fault.link.rpartition("/")[2].isdigit()
        assert not (fault.since and fault.until) or Version(fault.since) < Version(fault.until)
    assert len({(fault.key, fault.since, fault.vendor) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    ("version", "has"),
    [
        ("5.2.9", False),
        ("5.3.0", True),
        ("5.3.0rc2", True),  # what 5.3.0 says of itself
        ("5.3.4.post1.dev128+g05cd332b3", True),
        ("5.4.0.dev20260810+g7fb49bad4", False),
        ("5.4.0", False),
        ("0.1.0", True),
        ("unknown", True),
        ("0.1.dev1+g7fb49bad4", True),
    ],
)
def test_a_fault_holds_from_its_first_version_to_the_one_that_mends_it(version, has):
    fault = Fault("x", "it is wrong", "link", since="5.3.0", until="5.4.0")
    assert fault.holds(library.release(version), "nvidia") is has
    assert fault.holds(faults.NEWEST, "nvidia") is False


def test_a_fault_of_one_chip_is_not_told_of_another():
    assert "Ascend" in faults.known("linear", Version("5.3.4"), "ascend")
    assert faults.known("linear", Version("5.3.4"), "nvidia") == ""
    assert faults.known("linear", None, "nvidia") == ""


@pytest.mark.parametrize(
    ("key", "version", "has"),
    [
        ("mse_loss_backward", "5.3.0", False),
        ("mse_loss_backward", "5.3.1", True),
        ("nll_loss_backward", "5.0.0", True),
        ("_softmax", "5.0.2", False),
        ("_softmax", "5.3.0rc2", True),
        ("mm", "5.3.4", False),
    ],
)
def test_what_is_known_of_a_kernel(key, version, has):
    assert bool(faults.known(key, Version(version), "nvidia")) is has


def test_the_command_prints_them_for_the_newest_where_none_is_installed(monkeypatch, capsys):
    from verl_fl_overlay.cli import main

    monkeypatch.setattr(library, "installed_version", lambda: "")
    assert main(["ops", "--faults", "--wide", "*loss*"]) == 0
    told = capsys.readouterr().out
    assert re.search("^mse_loss_backward +5.3.1 to newest +all +for the reductions", told, re.MULTILINE)
    assert "none is installed" in told
    assert main(["ops", "--faults", "--json", "mse_loss_backward"]) == 0
    (fault,) = json.loads(capsys.readouterr().out)
    assert (fault["key"], fault["since"], fault["until"]) == ("mse_loss_backward", "5.3.1", "")
