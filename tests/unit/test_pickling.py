"""Hooked functions are pickled as the place of their hook: who has the overlay gets the hook, and nobody else does."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest

from verl_fl_overlay.hooks import Hook, HookSet

# As in ray and torch.distributed: defined in one module, bound in another, with a lock where it is defined.
DEFINED = """
import functools, threading
lock = threading.RLock()
def defined(): return lock and "original"
@functools.wraps(defined)
def decorated(): return lock and "original"
class Base:
    def inherited(self): return lock and "original"
"""
BOUND = """
from pickled_there import Base, decorated, defined
another = defined
def function(): return "original"
class Engine(Base):
    def method(self): return "original"
    @classmethod
    def made(cls): return "original"
    @staticmethod
    def static(): return "original"
class Special(Engine): pass
"""
FUNCTIONS = ("function", "defined", "another", "decorated")
METHODS = tuple(f"Engine.{name}" for name in ("method", "inherited", "made", "static"))


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    (tmp_path / "pickled_there.py").write_text(DEFINED)
    (tmp_path / "pickled_here.py").write_text(BOUND)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("pickled_here")

    def answer(wrapped, instance, args, kwargs):
        return "hooked"

    targets = (*FUNCTIONS, *METHODS)
    hooks = HookSet([Hook(t, module.__name__, t, answer, "f", True, "why", "upstream", "until") for t in targets])
    hooks.install()
    yield module, hooks
    hooks.remove()
    for name in ("pickled_here", "pickled_there"):
        del sys.modules[name]


def things(module):
    """Return every hooked thing that can be pickled, and what it is called with."""
    engine, special = module.Engine(), module.Special()
    functions = [(getattr(module, name), ()) for name in FUNCTIONS]
    bound = [(getattr(owner, name), ()) for owner in (engine, special) for name in ("method", "inherited")]
    free = [
        (getattr(owner, n), (owner(),)) for owner in (module.Engine, module.Special) for n in ("method", "inherited")
    ]
    of_classes = [(getattr(o, n), ()) for o in (module.Engine, module.Special, engine) for n in ("made", "static")]
    return [*functions, *bound, *free, *of_classes]


@pytest.fixture(params=["pickle", "cloudpickle", "ray.cloudpickle"])
def pickler(request):
    return pytest.importorskip(request.param)


def test_with_the_hook_where_it_is(hooked, pickler):
    module, hooks = hooked
    for thing, given in things(module):
        assert thing(*given) == "hooked"
        assert pickler.loads(pickler.dumps(thing))(*given) == "hooked", thing
        assert copy.copy(thing)(*given) == copy.deepcopy(thing)(*given) == "hooked"
    sent = pickler.dumps(things(module))
    hooks.remove()
    assert {thing(*given) for thing, given in pickler.loads(sent)} == {"original"}


def test_in_a_process_that_knows_nothing_of_the_overlay(hooked, pickler, tmp_path):
    module, _ = hooked
    (tmp_path / "sent").write_bytes(pickler.dumps(things(module)))
    code = (
        "import pickle, sys; things = pickle.load(open('sent', 'rb')); assert 'verl_fl_overlay' not in sys.modules\n"
        "print({thing(*given) for thing, given in things})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'original'}", done.stderr


def test_in_a_closure_as_ray_sends_it(hooked):
    cloudpickle = pytest.importorskip("cloudpickle")
    module, _ = hooked
    taken = things(module)

    def closure():
        return {thing(*given) for thing, given in taken}

    assert cloudpickle.loads(cloudpickle.dumps(closure))() == {"hooked"}


def test_a_method_is_the_same_thing_each_time_as_pythons_own(hooked):
    module, _ = hooked
    assert module.Engine.method is module.Engine.method is module.Special.method
    assert module.Engine.static is module.Engine().static
    assert module.Special.made() == "hooked"
