"""TransformerEngine-FL (a stand-in here) told from NVIDIA's, and its policy read anew for a Megatron engine."""

from __future__ import annotations

import logging
import sys
import textwrap

import pytest

from verl_fl_overlay import te_fl
from verl_fl_overlay.events import engine_built
from verl_fl_overlay.settings import Settings

CORE = """
    import os
    from dataclasses import dataclass
    @dataclass
    class Policy:
        prefer: str
        allow_vendors: object
        deny_vendors: frozenset
        per_op_order: tuple
    _cached = None
    def reset_global_policy():
        global _cached
        _cached = None
    def get_policy():
        global _cached
        if _cached is None:
            prefer = os.environ.get("TE_FL_PREFER", "flagos")
            _cached = Policy(prefer, frozenset({"CUDA"}), frozenset(), (("rmsnorm_fwd", ("flagos",)),))
        return _cached
"""


class MegatronEngine:
    __module__ = "verl.workers.engine.megatron.transformer_impl"


class FSDPEngine:
    __module__ = "verl.workers.engine.fsdp.transformer_impl"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(te_fl, "_told", {})
    for name in ("transformer_engine", "megatron"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    yield tmp_path
    for name in list(sys.modules):
        if name.split(".")[0] in ("transformer_engine", "megatron"):
            del sys.modules[name]


def make_fl(folder):
    (folder / "transformer_engine/plugin/core").mkdir(parents=True)
    (folder / "transformer_engine/plugin/__init__.py").write_text("")
    (folder / "transformer_engine/plugin/core/__init__.py").write_text(textwrap.dedent(CORE))


def test_nvidias_packages_are_left_alone(packages):
    assert te_fl.installed() == {"TransformerEngine-FL": False, "Megatron-LM-FL": False}
    assert te_fl.reason_off(Settings()) == "neither TransformerEngine-FL nor Megatron-LM-FL is installed"
    assert "transformer_engine" not in sys.modules


def test_megatron_fl_alone_is_told(packages):
    (packages / "megatron/plugin").mkdir()
    (packages / "megatron/plugin/decorators.py").write_text("")
    te_fl.apply(Settings.from_environment({"MG_FL_PREFER": "metax"}))
    assert te_fl.describe() == {"TransformerEngine-FL": False, "Megatron-LM-FL": True, "MG_FL_PREFER": "metax"}


def test_a_megatron_engine_makes_the_policy_what_the_environment_says(packages, monkeypatch, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    assert core.get_policy().prefer == "flagos"
    monkeypatch.setenv("TE_FL_PREFER", "vendor")
    assert core.get_policy().prefer == "flagos"
    stop = te_fl.start(Settings.from_environment({"TE_FL_PREFER": "vendor"}))
    try:
        with caplog.at_level(logging.WARNING):
            engine_built.emit(FSDPEngine())
            assert core.get_policy().prefer == "flagos"
            engine_built.emit(MegatronEngine())
            engine_built.emit(MegatronEngine())
    finally:
        stop()
    assert core.get_policy().prefer == "vendor"
    assert te_fl.describe()["policy"] == {
        "prefer": "vendor",
        "allow_vendors": ["CUDA"],
        "deny_vendors": [],
        "per_op": {"rmsnorm_fwd": ["flagos"]},
        "another implementation is tried when one fails": True,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "a Megatron engine starts with TE_FL_PREFER=vendor, and TransformerEngine-FL takes vendor implementations "
        "first; export TE_FL_PREFER=flagos for those of FlagOS"
    ]


def test_no_warning_where_flagos_is_asked_for(packages, monkeypatch, caplog):
    make_fl(packages)
    monkeypatch.setenv("TE_FL_PREFER", "flagos")
    te_fl.apply(Settings.from_environment({"TE_FL_PREFER": "flagos"}))
    assert not caplog.records
