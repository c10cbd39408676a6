"""Hooks on made-up modules: every assertion is about what a caller gets."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import wrapt

from verl_fl_overlay.errors import HookError
from verl_fl_overlay.hooks import Hook, HookSet, State

SOURCE = """
def greet(name):
    return "hello " + name

class Base:
    def run(self, x):
        return x
    @classmethod
    def make(cls):
        return cls.__name__
    @staticmethod
    def twice(x):
        return 2 * x

class Child(Base):
    pass
"""
_numbers = itertools.count()


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the name of a fresh module that can be imported and has not been."""
    name = f"hooked_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def shout(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return f"{wrapped(*args, **kwargs)}!"


def hook(module: str, attribute: str = "greet", name: str = "", wrapper: Any = shout, **fields: Any) -> Hook:
    defaults = {"feature": "f", "required": False, "why": "w", "upstream": "u", "until": "t"}
    return Hook(name or attribute, module, attribute, wrapper, **{**defaults, **fields})


def states(hooks: HookSet) -> dict[str, str]:
    return {status.hook.name: status.state.value for status in hooks.report()}


def test_module_imported_after_install(module_name):
    hooks = HookSet([hook(module_name)])
    hooks.install()
    assert module_name not in sys.modules, "installing imports nothing"
    assert states(hooks) == {"greet": "waiting"}
    assert importlib.import_module(module_name).greet("x") == "hello x!"
    assert states(hooks) == {"greet": "installed"}


def test_module_imported_before_install(module_name):
    module = importlib.import_module(module_name)
    HookSet([hook(module_name)]).install()
    assert module.greet("x") == "hello x!"


def test_methods_of_every_kind(module_name):
    module = importlib.import_module(module_name)
    seen = []

    def note(wrapped, instance, args, kwargs):
        seen.append(instance)
        return ("seen", wrapped(*args, **kwargs))

    HookSet([hook(module_name, f"Base.{a}", wrapper=note) for a in ("run", "make", "twice")]).install()
    child = module.Child()
    assert child.run(1) == ("seen", 1)
    assert module.Child.make() == ("seen", "Child")
    assert module.Base.twice(2) == ("seen", 4)
    assert seen == [child, module.Child, None]


def test_install_twice_wraps_once(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name)])
    hooks.install()
    hooks.install()
    assert module.greet("x") == "hello x!"


def test_remove_is_exact_and_repeatable(module_name):
    module = importlib.import_module(module_name)
    original, make = module.greet, module.Base.__dict__["make"]
    hooks = HookSet([hook(module_name), hook(module_name, "Base.make")])
    hooks.install()
    hooks.remove()
    hooks.remove()
    assert module.greet is original
    assert module.Base.__dict__["make"] is make
    assert set(states(hooks).values()) == {"removed"}
    hooks.install()
    assert module.greet("x") == "hello x!"


def test_removed_before_its_module_comes(module_name):
    hooks = HookSet([hook(module_name)])
    hooks.install()
    hooks.remove()
    assert importlib.import_module(module_name).greet("x") == "hello x"
    hooks.install()
    assert sys.modules[module_name].greet("x") == "hello x!", "installed again, the module being there by now"


def test_inherited_method_leaves_no_residue(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name, "Child.run")])
    hooks.install()
    assert module.Child().run(1) == "1!"
    assert module.Base().run(1) == 1
    hooks.remove()
    assert "run" not in module.Child.__dict__


def test_foreign_wrapt_wrapper_on_top_and_under(module_name):
    module = importlib.import_module(module_name)
    wrapt.wrap_function_wrapper(module, "greet", lambda w, i, a, k: f"<{w(*a, **k)}>")
    hooks = HookSet([hook(module_name)])
    hooks.install()
    wrapt.wrap_function_wrapper(module, "greet", lambda w, i, a, k: f"[{w(*a, **k)}]")
    assert module.greet("x") == "[<hello x>!]"
    assert states(hooks) == {"greet": "installed"}
    hooks.remove()
    assert module.greet("x") == "[<hello x>]", "only ours was taken out"


def test_foreign_closure_on_top_turns_ours_off(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name)])
    hooks.install()
    ours = module.greet

    @functools.wraps(ours)
    def closure(name):
        return f"[{ours(name)}]"

    module.greet = closure
    assert module.greet("x") == "[hello x!]"
    assert states(hooks) == {"greet": "installed"}
    hooks.remove()
    assert module.greet is closure, "what others did stays"
    assert module.greet("x") == "[hello x]", "ours does nothing any more"


def test_raising_wrapper_reaches_the_caller_and_is_counted(module_name):
    module = importlib.import_module(module_name)

    def fail(wrapped, instance, args, kwargs):
        raise ZeroDivisionError("ours")

    hooks = HookSet([hook(module_name, wrapper=fail)])
    hooks.install()
    with pytest.raises(ZeroDivisionError, match="ours"):
        module.greet("x")
    assert hooks.report()[0].calls == 1


def test_error_of_the_target_passes_unchanged(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name)])
    hooks.install()
    with pytest.raises(TypeError, match="can only concatenate str"):
        module.greet(3)


def test_misspelt_module_stays_waiting():
    hooks = HookSet([hook("no_such_module_anywhere")])
    hooks.install()
    status = hooks.report()[0]
    assert (status.state, status.calls) == (State.WAITING, 0)


def test_missing_optional_target_fails_alone(module_name):
    hooks = HookSet([hook(module_name, "absent", feature="other"), hook(module_name)])
    hooks.install()
    assert importlib.import_module(module_name).greet("x") == "hello x!"
    assert states(hooks) == {"absent": "failed", "greet": "installed"}
    assert f"{module_name} has no absent" in hooks.report()[0].detail


def test_optional_hook_that_does_not_fit_is_warned_about_once(module_name, caplog):
    HookSet([hook(module_name), hook(module_name, "absent")]).install()
    importlib.import_module(module_name)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"hook absent cannot be put on {module_name}:absent and is left out: {module_name} has no absent"
    ]


def test_optional_hook_that_does_not_fit_is_strictly_refused(module_name):
    hooks = HookSet([hook(module_name, feature="other"), hook(module_name, "absent")], strict=True)
    hooks.install()
    for _ in range(2):
        with pytest.raises(HookError, match="hook 'absent' cannot be put on"):
            importlib.import_module(module_name)
    assert states(hooks) == {"greet": "removed", "absent": "failed"}


@pytest.mark.parametrize("required", [True, False])
def test_absent_module(module_name, required):
    module = importlib.import_module(module_name)
    hooks = HookSet(
        [hook(module_name), hook("gone", name="bad", required=required)], absent={"bad": "there is no gone"}
    )
    if required:
        with pytest.raises(HookError, match="hook 'bad' cannot be put on gone:greet: there is no gone"):
            hooks.install()
    else:
        hooks.install()
    assert module.greet("x") == ("hello x" if required else "hello x!")
    assert (hooks.report()[1].state, hooks.report()[1].detail) == (State.FAILED, "there is no gone")


def test_removed_set_refuses_nothing_any_more(module_name, tmp_path):
    other = f"{module_name}_other"
    (tmp_path / f"{other}.py").write_text(SOURCE)
    both = [hook(other, name="good"), hook(module_name, "absent", name="bad", required=True)]
    first = HookSet(both)
    first.install()
    with pytest.raises(HookError):
        importlib.import_module(module_name)
    first.remove()
    HookSet(both, disabled={"bad": "as the error advises"}).install()
    assert importlib.import_module(other).greet("x") == "hello x!"
    assert importlib.import_module(module_name).greet("x") == "hello x"


@pytest.mark.parametrize("attribute", ["greet", "Base.run", "Base.make"])
@pytest.mark.parametrize("how", ["imported", "reloaded"])
def test_hook_lost_by_a_module_imported_anew_is_told(module_name, attribute, how):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name, attribute)])
    hooks.install()
    if how == "imported":
        del sys.modules[module_name]
        assert states(hooks) == {attribute: "installed"}
        importlib.import_module(module_name)
    else:
        importlib.reload(module)
    assert states(hooks) == {attribute: "failed"}
    assert "imported anew" in hooks.report()[0].detail
    hooks.remove()
    assert states(hooks) == {attribute: "removed"}, "what others still hold of the old module is native again, too"


def test_hook_inherited_by_a_subclass_in_its_class_s_place_is_not_lost(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name, "Base.run")])
    hooks.install()
    module.Base = type("Mine", (module.Base,), {})
    assert states(hooks) == {"Base.run": "installed"}


def test_group_is_rolled_back_whole(module_name):
    hooks = HookSet([hook(module_name), hook(module_name, "Base.run"), hook(module_name, "absent")])
    hooks.install()
    module = importlib.import_module(module_name)
    assert (module.greet("x"), module.Base().run(1)) == ("hello x", 1)
    assert set(states(hooks).values()) == {"failed"}
    assert "taken back: absent failed" in hooks.report()[0].detail


def test_required_target_missing_refuses_every_import(module_name, tmp_path, monkeypatch):
    other = f"{module_name}_other"
    (tmp_path / f"{other}.py").write_text(SOURCE)
    hooks = HookSet([hook(other, name="good"), hook(module_name, "absent", name="bad", required=True)])
    hooks.install()
    good = importlib.import_module(other)
    assert good.greet("x") == "hello x!"
    for _ in range(3):  # a retry must not succeed without the hook
        with pytest.raises(
            HookError, match=r"(?s)hook 'bad' cannot be put on .*:absent.*VERL_FL_DISABLE=bad"
        ) as raised:
            importlib.import_module(module_name)
        assert not isinstance(raised.value, ImportError), "verl swallows ImportErrors"
        assert module_name not in sys.modules
    assert good.greet("x") == "hello x", "nothing is left installed"
    assert states(hooks) == {"good": "removed", "bad": "failed"}


def test_required_target_missing_in_a_module_that_is_there(module_name):
    importlib.import_module(module_name)
    with pytest.raises(HookError):
        HookSet([hook(module_name, "absent", required=True)]).install()


def test_disabled_by_name(module_name):
    hooks = HookSet([hook(module_name), hook(module_name, "Base.run")], disabled={"greet": "asked"})
    hooks.install()
    module = importlib.import_module(module_name)
    assert (module.greet("x"), module.Base().run(1)) == ("hello x", "1!")
    assert [s.detail for s in hooks.report() if s.state is State.DISABLED] == ["asked"]


def test_verify_keeps_a_hook_off(module_name):
    def verify(hook, target):
        raise HookError("not what I knew")

    hooks = HookSet([hook(module_name)], verify=verify)
    hooks.install()
    assert importlib.import_module(module_name).greet("x") == "hello x"
    assert hooks.report()[0].detail == "not what I knew"


def test_threads_installing_at_once(module_name):
    module = importlib.import_module(module_name)
    hooks = HookSet([hook(module_name), hook(module_name, "Base.run")])
    together = threading.Barrier(8)

    def install():
        together.wait()
        hooks.install()

    threads = [threading.Thread(target=install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (module.greet("x"), module.Base().run(1)) == ("hello x!", "1!")


def test_install_waits_for_a_module_another_thread_is_executing(tmp_path, monkeypatch):
    name = f"slow_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text("import time, begun\nbegun.event.set()\ntime.sleep(0.3)\n" + SOURCE)
    begun = type(sys)("begun")
    begun.event = threading.Event()
    monkeypatch.setitem(sys.modules, "begun", begun)
    monkeypatch.syspath_prepend(str(tmp_path))
    importer = threading.Thread(target=importlib.import_module, args=(name,))
    importer.start()
    begun.event.wait()
    HookSet([hook(name, required=True)]).install()
    importer.join()
    assert sys.modules[name].greet("x") == "hello x!"
