from __future__ import annotations

import abc
import sys
import types
import zipfile
from pathlib import Path

import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import MISSING
from verl_fl_overlay.compat.release import pinning
from verl_fl_overlay.compat.release.fingerprint import fingerprint
from verl_fl_overlay.compat.release.sources import Tree, opened
from verl_fl_overlay.errors import HookError

PLAIN = '''
import os

class Engine:
    """Doc."""

    @classmethod
    def new(cls, kind, /, *rest, size: int = 3, **options):
        """Doc."""
        # a comment
        if size > 2:
            return cls(kind)
        return f"{kind}-{size!r}"
'''
REFORMATTED = '''
class Engine:
    @classmethod
    def new(
        cls, kind, /, *rest, size=3, **options
    ) -> "Engine":
        """Another text."""
        if (size > 2):

            return cls( kind )
        return f'{kind}-{size!r}'
'''


def of(tmp_path: Path, text: str, attribute: str = "Engine.new"):
    (tmp_path / "m.py").write_text(text)
    return fingerprint(Tree(tmp_path, "made up"), "m", attribute)


def test_contract(tmp_path):
    found = of(tmp_path, PLAIN)
    assert found.kind == "classmethod"
    assert found.parameters == ("cls", "kind", "/", "*rest", "size=3", "**options")


def test_looks_do_not_matter(tmp_path):
    plain, reformatted = of(tmp_path, PLAIN), of(tmp_path, REFORMATTED)
    assert plain.same_contract(reformatted)
    assert plain.body == reformatted.body


@pytest.mark.parametrize(("old", "new"), [("size > 2", "size > 3"), ("{size!r}", "{size!s}"), ("cls(kind)", "cls()")])
def test_meaning_does(tmp_path, old, new):
    assert of(tmp_path, PLAIN).body != of(tmp_path, PLAIN.replace(old, new)).body


def test_digest_is_the_same_on_every_python(tmp_path):
    assert of(tmp_path, PLAIN).body == "54d04832baa832f7"


def test_missing(tmp_path):
    assert of(tmp_path, PLAIN, "Engine.old") == MISSING
    assert of(tmp_path, PLAIN, "Gone.new") == MISSING
    assert fingerprint(Tree(tmp_path, "made up"), "no.such", "x") == MISSING


def test_definition_inside_try_and_the_last_one_wins(tmp_path):
    text = "try:\n    def f(a): return 1\nexcept ImportError:\n    def f(a, b): return 2\n"
    assert of(tmp_path, text, "f").parameters == ("a", "b")


def test_imported_name_is_followed(tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").write_text("from .inner import work as run\nfrom einops import pack\n")
    (tmp_path / "verl" / "inner.py").write_text("def work(a, b=1): return a\n")
    found = fingerprint(Tree(tmp_path, "made up"), "verl", "run")
    assert found.parameters == ("a", "b=1")
    assert found.at == "verl.inner:work"
    outside = fingerprint(Tree(tmp_path, "made up"), "verl", "pack")
    assert (outside.kind, outside.at) == ("import", "einops:pack")


def test_name_from_a_star_import_is_followed(tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").write_text("from os import *\nfrom .first import *\nfrom .second import *\n")
    (tmp_path / "verl" / "first.py").write_text("class Other: pass\n")
    (tmp_path / "verl" / "second.py").write_text("class Config:\n    size: int = 1\ndef _own(): pass\n")
    found = fingerprint(Tree(tmp_path, "made up"), "verl", "Config.size")
    assert (found.kind, found.at) == ("attribute", "verl.second:Config.size")
    assert fingerprint(Tree(tmp_path, "made up"), "verl", "_own") == MISSING, "a star leaves it out"


def test_imports_in_a_circle_end(tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "a.py").write_text("from .b import f\n")
    (tmp_path / "verl" / "b.py").write_text("from .a import f\nclass C(C): pass\n")
    assert fingerprint(Tree(tmp_path, "made up"), "verl.a", "f") == MISSING
    assert fingerprint(Tree(tmp_path, "made up"), "verl.b", "C.f") == MISSING


def test_inherited_method_and_attributes(tmp_path):
    text = """
class Base:
    table = {}
    def __init__(self):
        self.mode: str = "train"
        self.mesh, self.ranks = None, ()
    def run(self, x): return x
    def stub(self): raise NotImplementedError("later")
class Engine(Base):
    go = Base.run
    pass
"""
    assert of(tmp_path, text, "Engine.run").at == "m:Base.run"
    assert of(tmp_path, text, "Engine.stub") == MISSING
    assert of(tmp_path, text, "Engine.table").kind == "attribute"
    assert of(tmp_path, text, "Engine.mode").kind == "instance attribute"
    assert of(tmp_path, text, "Engine.ranks").kind == "instance attribute"
    assert of(tmp_path, text, "Engine.table") != of(tmp_path, text.replace("{}", "[]"), "Engine.table")


class Live:
    def train_batch(self, data, loss_function):
        return data

    def renamed(self, data, loss):
        return data

    def anything(*args, **kwargs):
        return args


def hook(name="engine.train_batch"):
    return next(h for h in compat.select(compat.InstalledVerl("0.9.1", "")).hooks if h.name == name)


def test_live_function_with_the_pinned_parameters():
    pins.verify(hook(), Live.__dict__["train_batch"])


def test_live_function_that_takes_anything_was_wrapped_by_others():
    pins.verify(hook(), Live.__dict__["anything"])


def test_live_method_that_passes_all_on_was_wrapped_by_others():
    def wrapper(self, *a, **k):
        return self

    pins.verify(hook(), wrapper)
    pins.verify(hook("engine.new"), classmethod(wrapper))
    with pytest.raises(HookError, match="is function"):
        pins.verify(hook("engine.new"), wrapper)
    wrapper.__module__ = "verl.workers.engine.base"
    with pytest.raises(HookError, match=r"is function \(self, \*a, \*\*k\)"):
        pins.verify(hook(), wrapper)


def test_live_function_with_other_parameters():
    with pytest.raises(
        HookError, match=r"is function \(self, data, loss\), expected function \(self, data, loss_function\) as"
    ):
        pins.verify(hook(), Live.__dict__["renamed"])


def test_live_stub_that_is_inherited():
    def train_batch(self, data, loss_function):
        """Doc."""
        raise NotImplementedError("later")

    with pytest.raises(HookError, match="only raises NotImplementedError"):
        pins.verify(hook(), train_batch)


def test_live_keyword_only_parameter():
    def train_batch(self, data, *, loss_function):
        return data

    with pytest.raises(HookError, match=r"\(self, data, \*, loss_function\)"):
        pins.verify(hook(), train_batch)


def test_live_reliance_in_the_same_module(monkeypatch):
    class EngineRegistry:
        @classmethod
        def get_engine_cls(cls, model_type, backend):
            return cls

        @classmethod
        def register(cls, model_type, backend, device="cuda"):
            return cls

    base = types.ModuleType("verl.workers.engine.base")
    base.EngineRegistry = EngineRegistry
    monkeypatch.setitem(sys.modules, base.__name__, base)
    live = EngineRegistry.__dict__["get_engine_cls"]
    with pytest.raises(HookError, match=r"relies on .*EngineRegistry._engines, which is not there"):
        pins.verify(hook("chip.engine_class"), live)
    EngineRegistry._engines = {}
    pins.verify(hook("chip.engine_class"), live)
    EngineRegistry.register = classmethod(lambda cls, entry: cls)
    with pytest.raises(HookError, match=r"EngineRegistry.register, which is classmethod \(cls, entry\)"):
        pins.verify(hook("chip.engine_class"), live)


def test_live_reliance_in_another_module_is_compared_where_that_is_loaded(monkeypatch):
    pinned = pins.pinned("verl.plugin.platform.platform_base:PlatformBase")["0.9.1"]
    abstract = abc.abstractmethod(lambda self: None)
    as_pinned = abc.ABCMeta("PlatformBase", (), dict.fromkeys(pinned.parameters, abstract))

    def _detect_platform_name():
        return "nvidia"

    base = types.ModuleType("verl.plugin.platform.platform_base")
    base.PlatformBase = as_pinned
    pins.verify(hook("chip.platform"), _detect_platform_name)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    pins.verify(hook("chip.platform"), _detect_platform_name)
    base.PlatformBase = abc.ABCMeta("PlatformBase", (), dict.fromkeys((*pinned.parameters, "more"), abstract))
    with pytest.raises(HookError, match=r"relies on .*:PlatformBase, which is class \(.*more.*\), expected class"):
        pins.verify(hook("chip.platform"), _detect_platform_name)
    del base.PlatformBase
    with pytest.raises(HookError, match=r"relies on .*:PlatformBase, which is not there"):
        pins.verify(hook("chip.platform"), _detect_platform_name)
    base.__spec__ = types.SimpleNamespace(_initializing=True)
    pins.verify(hook("chip.platform"), _detect_platform_name)


def test_pinning_a_wheel_and_its_folder_gives_the_same(tmp_path):
    inside = {"verl/version/version": "0.9.1\n", "verl/workers/engine/base.py": "class BaseEngine:\n    pass\n"}
    with zipfile.ZipFile(tmp_path / "verl.whl", "w") as archive:
        for name, text in inside.items():
            archive.writestr(name, text)
    with zipfile.ZipFile(tmp_path / "verl.whl") as archive:
        archive.extractall(tmp_path / "tree")
    with opened(str(tmp_path / "verl.whl")) as wheel, opened(str(tmp_path / "tree")) as tree:
        made = pinning.pins_of(wheel)
        assert made == pinning.pins_of(tree)
    assert made["functions"]["verl.workers.engine.base:BaseEngine.train_batch"] == {"kind": "missing"}
