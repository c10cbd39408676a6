"""Hooked functions are pickled as the functions under them are: by name."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

from verl_fl_overlay.hooks import Hook, HookSet

MODULE = """
def function(): return "original"
class Engine:
    def method(self): return "original"
    @classmethod
    def made(cls): return "original"
    @staticmethod
    def static(): return "original"
"""
TARGETS = ("function", "Engine.method", "Engine.made", "Engine.static")


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    (tmp_path / "pickled_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("pickled_here")

    def answer(wrapped, instance, args, kwargs):
        return "hooked"

    hooks = HookSet([Hook(t, module.__name__, t, answer, "f", True, "why", "upstream", "until") for t in TARGETS])
    hooks.install()
    yield module, hooks
    hooks.remove()
    del sys.modules["pickled_here"]


def test_by_name(hooked):
    module, hooks = hooked
    engine = module.Engine()
    for target in (module.function, engine.method, module.Engine.made, engine.static, module.Engine.static):
        assert pickle.loads(pickle.dumps(target))() == "hooked"
    assert pickle.loads(pickle.dumps(module.Engine.method))(engine) == "hooked"
    assert pickle.loads(pickle.dumps(engine)).method() == "hooked"
    sent = pickle.dumps([module.function, engine.method])
    hooks.remove()
    assert [loaded() for loaded in pickle.loads(sent)] == ["original", "original"]


def test_by_cloudpickle_as_ray_sends_it(hooked):
    cloudpickle = pytest.importorskip("cloudpickle")
    module, _ = hooked
    engine = module.Engine()

    def closure():
        return module.function(), engine.method()

    assert cloudpickle.loads(cloudpickle.dumps(closure))() == ("hooked", "hooked")
    for target in (module.function, engine.method, module.Engine.made):
        assert cloudpickle.loads(cloudpickle.dumps(target))() == "hooked"
