"""Stand-ins for the kernels, and what is found about them, for the tests of this folder."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def kernels(monkeypatch):
    """Run the kernels' stand-ins on the CPU."""
    from fused.stand_ins import StandIns
    from verl_fl_overlay.kernels import agreement as fused_check

    stand_ins = StandIns()
    for name, module in stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fused_check, "NATIVE_DEVICES", ())
    return stand_ins


@pytest.fixture
def agreement():
    from verl_fl_overlay.kernels.agreement import Agreement

    return Agreement()


@pytest.fixture
def fuse(agreement):
    """Return a function that fuses models, all of a test's as those of one process; it is taken back after the test."""
    from verl_fl_overlay.kernels.model import FusedModules
    from verl_fl_overlay.settings.variables import FUSED

    made = {}

    def fuse(model, kinds=FUSED):
        found = made.setdefault(kinds, FusedModules(kinds, agreement))
        found.fuse(model)
        return found

    yield fuse
    for each in made.values():
        each.remove()
