from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.compat import pinning, pins
from verl_fl_overlay.compat.fingerprint import MISSING, Folder, fingerprint
from verl_fl_overlay.errors import HookError, OverlayError

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
    return fingerprint(Folder(tmp_path), "m", attribute)


def test_contract(tmp_path):
    found = of(tmp_path, PLAIN)
    assert found.kind == "classmethod"
    assert found.parameters == ("cls", "kind", "/", "*rest", "size=3", "**options")


def test_looks_do_not_matter(tmp_path):
    assert of(tmp_path, PLAIN) == of(tmp_path, REFORMATTED)


@pytest.mark.parametrize(("old", "new"), [("size > 2", "size > 3"), ("{size!r}", "{size!s}"), ("cls(kind)", "cls()")])
def test_meaning_does(tmp_path, old, new):
    assert of(tmp_path, PLAIN).body != of(tmp_path, PLAIN.replace(old, new)).body


def test_digest_is_the_same_on_every_python(tmp_path):
    assert of(tmp_path, PLAIN).body == "54d04832baa832f7"


def test_missing(tmp_path):
    assert of(tmp_path, PLAIN, "Engine.old") == MISSING
    assert of(tmp_path, PLAIN, "Gone.new") == MISSING
    assert fingerprint(Folder(tmp_path), "no.such", "x") == MISSING


def test_definition_inside_try_and_the_last_one_wins(tmp_path):
    text = "try:\n    def f(a): return 1\nexcept ImportError:\n    def f(a, b): return 2\n"
    assert of(tmp_path, text, "f").parameters == ("a", "b")


def test_imported_name_is_followed(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("from .inner import work as run\n")
    (tmp_path / "pkg" / "inner.py").write_text("def work(a, b=1): return a\n")
    assert fingerprint(Folder(tmp_path), "pkg", "run").parameters == ("a", "b=1")


@pytest.mark.parametrize("release", compat.RELEASES)
def test_every_hook_is_pinned_and_no_pin_is_left_over(release):
    hooks = compat.select(compat.InstalledVerl(release, "")).hooks
    assert {h.target for h in hooks if h.module.startswith("verl.")} == set(pins.load(release))
    assert not [t for t, pin in pins.load(release).items() if pin["kind"] == "missing"]


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


def test_live_function_with_other_parameters():
    with pytest.raises(HookError, match=r"are \(self, data, loss\), expected \(self, data, loss_function\) as in verl"):
        pins.verify(hook(), Live.__dict__["renamed"])


def test_pinning_what_is_no_verl(tmp_path):
    with pytest.raises(OverlayError, match="does not hold verl"):
        pinning.pins_of(tmp_path)
    (tmp_path / "x.whl").write_bytes(b"PK no zip")
    with pytest.raises(OverlayError, match="neither a folder nor a wheel"):
        pinning.pins_of(tmp_path / "x.whl")


def test_pinning_a_wheel_and_its_folder_gives_the_same(tmp_path):
    inside = {"verl/version/version": "0.9.1\n", "verl/workers/engine/base.py": "class BaseEngine:\n    pass\n"}
    with zipfile.ZipFile(tmp_path / "verl.whl", "w") as archive:
        for name, text in inside.items():
            archive.writestr(name, text)
    with zipfile.ZipFile(tmp_path / "verl.whl") as archive:
        archive.extractall(tmp_path / "tree")
    made = pinning.pins_of(tmp_path / "verl.whl")
    assert made == pinning.pins_of(tmp_path / "tree")
    assert made["functions"]["verl.workers.engine.base:BaseEngine.train_batch"]["kind"] == "missing"
