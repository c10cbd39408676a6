"""FlagCX's plugin and library: what is missing is named, with the tried places."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from verl_fl_overlay import events
from verl_fl_overlay.compat.process_group import checkpoint_engine_hooks
from verl_fl_overlay.errors import FlagCXError
from verl_fl_overlay.features import flagcx as feature
from verl_fl_overlay.features import flagcx_library, reason_off
from verl_fl_overlay.settings import Settings

PLUGIN = """
import os
os.environ.pop('TORCH_DEVICE_BACKEND_AUTOLOAD', None)
from torch.distributed import Backend
Backend.backend_capability['flagcx'] = ['cuda']
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as FlagCX's build leaves it: a library that loads, and a plugin that counts its imports."""
    (tmp_path / "build/lib").mkdir(parents=True)
    shutil.copy(find_spec("_ctypes").origin, tmp_path / "build/lib/libflagcx.so")
    package = tmp_path / "plugin/torch/flagcx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    monkeypatch.setenv("FLAGCX_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "flagcx", raising=False)
    yield tmp_path
    sys.modules.pop("flagcx", None)
    if "torch.distributed" in sys.modules:
        sys.modules["torch.distributed"].Backend.backend_capability.pop("flagcx", None)


@pytest.fixture
def flagcx():
    """The feature, started."""
    made = feature.FlagCX(Settings())
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("early", [True, False])
def test_groups_that_were_there_before_are_told_to_have_no_guards(monkeypatch, early):
    groups = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: early)
    monkeypatch.setitem(sys.modules, "torch.distributed", groups)
    monkeypatch.setattr(events, "failures", events.Failures())
    made = feature.FlagCX(Settings())
    made.start()
    made.stop()
    assert ["no guards" in told for told in events.failures.told().values()] == [True] * early


@pytest.mark.parametrize("backend", [None, "nccl", "cpu:gloo,cuda:nccl", "gloo", 3])
def test_what_does_not_name_flagcx_is_left_alone(folder, backend, flagcx):
    assert flagcx.for_group(backend) is backend
    assert "flagcx" not in sys.modules


def test_the_plugin_is_imported_from_the_path_and_the_environment_kept(folder, monkeypatch, flagcx):
    pytest.importorskip("torch")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    assert flagcx.for_group("cpu:gloo,cuda:flagcx") == "cpu:gloo,cuda:flagcx"
    assert flagcx.describe() == {
        "plugin": str(folder / "plugin/torch/flagcx/__init__.py"),
        "library": "",  # a stand-in's plugin needs none
        "version": "",
        "device": "cuda",
        "loaded_by": "the overlay",
        "conflict": "",
        "library path": str(folder),
        "guards": [],
    }
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"


def test_a_missing_plugin_is_named_with_the_tried_places(folder, flagcx):
    shutil.rmtree(folder / "plugin")
    with pytest.raises(FlagCXError) as error:
        flagcx.for_group("flagcx")
    assert str(error.value) == (
        "USE_FLAGCX is on and FlagCX's torch plugin (the package 'flagcx') was not found; tried site-packages, "
        f"{folder}/plugin/torch/flagcx. Install it with: pip install --no-deps --no-build-isolation "
        f"{folder}/plugin/torch"
    )


def test_a_folder_of_sources_with_that_name_is_no_plugin(folder, monkeypatch, tmp_path):
    (tmp_path / "elsewhere/flagcx").mkdir(parents=True)
    pytest.importorskip("torch")
    sys.path.insert(0, str(tmp_path / "elsewhere"))
    assert feature.load().plugin == str(folder / "plugin/torch/flagcx/__init__.py")


def test_without_a_path_the_error_says_so(folder, monkeypatch, flagcx):
    monkeypatch.delenv("FLAGCX_PATH")
    with pytest.raises(FlagCXError) as error:
        flagcx.for_group("flagcx")
    assert str(error.value) == (
        "USE_FLAGCX is on and FlagCX's torch plugin (the package 'flagcx') was not found; tried site-packages; "
        "FLAGCX_PATH is not set. Install it with: pip install --no-deps --no-build-isolation <FlagCX>/plugin/torch"
    )


def test_a_missing_library_is_named_with_the_tried_places(folder, flagcx):
    (folder / "build/lib/libflagcx.so").unlink()
    with pytest.raises(FlagCXError) as error:
        flagcx.for_group("flagcx")
    assert str(error.value) == (
        f"FLAGCX_PATH={folder} holds no libflagcx.so; tried {folder}/lib/libflagcx.so, "
        f"{folder}/build/lib/libflagcx.so, {folder}/libflagcx.so. Build FlagCX there, or set "
        "FLAGCX_PATH to where it was built"
    )


def test_a_library_that_does_not_load_is_named(folder, flagcx):
    (folder / "build/lib/libflagcx.so").write_text("no library")
    (folder / "plugin/torch/flagcx/__init__.py").write_text(
        "raise ImportError('libflagcx.so: cannot open shared object file: ...')"
    )
    with pytest.raises(
        FlagCXError, match=f"^{folder}/build/lib/libflagcx.so cannot be loaded: .*Build FlagCX for this"
    ):
        flagcx.for_group("flagcx")


def test_a_plugin_for_another_torch_is_told(folder, flagcx):
    (folder / "plugin/torch/flagcx/__init__.py").write_text("from ._C import *")
    with pytest.raises(FlagCXError, match=r"^FlagCX's torch plugin cannot be imported: No module named 'flagcx._C'"):
        flagcx.for_group("flagcx")


def test_a_plugin_without_its_library_is_told_of_the_path(folder, monkeypatch):
    (folder / "plugin/torch/flagcx/__init__.py").write_text(
        "raise ImportError('libflagcx.so: cannot open shared object file: No such file or directory')"
    )
    sys.path.insert(0, str(folder / "plugin/torch"))
    monkeypatch.delenv("FLAGCX_PATH")
    with pytest.raises(FlagCXError, match=r"directory\. Set FLAGCX_PATH to the folder that FlagCX was built in, or"):
        feature.load()


@pytest.mark.parametrize("library", ["libflagcx.so", "lib/libflagcx.so"])
def test_an_installed_package_is_a_path(folder, library, monkeypatch, flagcx):
    pytest.importorskip("torch")
    package = folder / "plugin/torch/flagcx"
    (package / library).parent.mkdir(exist_ok=True)
    (folder / "build/lib/libflagcx.so").rename(package / library)
    monkeypatch.setenv("FLAGCX_PATH", str(package))
    assert flagcx.for_group("flagcx") == "cpu:gloo,cuda:flagcx"
    assert flagcx.describe()["plugin"] == str(package / "__init__.py")


def test_a_plugin_that_registers_nothing_is_told(folder, flagcx):
    pytest.importorskip("torch")
    (folder / "plugin/torch/flagcx/__init__.py").write_text("")
    with pytest.raises(FlagCXError, match="registered no backend 'flagcx'; build it anew"):
        flagcx.for_group("flagcx")


def test_a_plugin_that_torch_loaded_is_told(folder, monkeypatch, flagcx):
    pytest.importorskip("torch")
    feature.load()
    flagcx.for_group("flagcx")
    assert flagcx.describe()["loaded_by"] == (
        "torch, when it was imported (TORCH_DEVICE_BACKEND_AUTOLOAD=0 leaves that to the overlay)"
    )


@pytest.mark.parametrize("strict", [False, True])
def test_another_library_than_the_paths_is_told_and_strictly_refused(folder, monkeypatch, flagcx, strict):
    pytest.importorskip("torch")
    beside = folder / "site-packages/flagcx/libflagcx.so"
    monkeypatch.setattr(flagcx_library, "mapped", lambda: [str(beside)])
    told = (
        f"FlagCX's torch plugin {folder}/plugin/torch/flagcx/__init__.py uses {beside}, and FLAGCX_PATH={folder} names "
        f"{folder}/build/lib/libflagcx.so, which rollout (vllm-plugin-FL) loads: two builds of FlagCX in one run. Set "
        "FLAGCX_PATH to the build that the plugin belongs to, or install that build's plugin: pip install "
        f"--no-deps --no-build-isolation {folder}/plugin/torch"
    )
    monkeypatch.setattr(events, "failures", events.Failures())
    events.failures.begin(strict)
    if strict:
        with pytest.raises(FlagCXError) as error:
            flagcx.for_group("flagcx")
        assert str(error.value) == told
    else:
        assert flagcx.for_group("flagcx") == "cpu:gloo,cuda:flagcx"
        assert list(events.failures.told().values()) == [f"FlagCXError: {told}"]


def test_the_paths_library_under_another_name_is_the_same(folder, monkeypatch, flagcx):
    pytest.importorskip("torch")
    (folder / "link").symlink_to(folder / "build/lib/libflagcx.so")
    monkeypatch.setattr(flagcx_library, "mapped", lambda: [str(folder / "link")])
    assert feature.load().conflict == ""


def test_two_libraries_without_a_path_are_told(folder, monkeypatch):
    pytest.importorskip("torch")
    sys.path.insert(0, str(folder / "plugin/torch"))
    monkeypatch.delenv("FLAGCX_PATH")
    monkeypatch.setattr(flagcx_library, "mapped", lambda: ["/a"])
    assert feature.load().conflict == ""
    monkeypatch.setattr(flagcx_library, "mapped", lambda: ["/a", "/b"])
    assert "__init__.py uses /a, /b: two builds of FlagCX in one run" in feature.load().conflict


@pytest.mark.parametrize("engine", ["nccl", "kimi_ckpt_engine", "delta_sharded"])
def test_native_checkpoint_engines_are_refused(engine, flagcx):
    wrapper = checkpoint_engine_hooks()[0].wrapper
    with pytest.raises(FlagCXError, match=f"checkpoint engine '{engine}' communicates through") as error:
        wrapper(lambda backend: backend, None, (engine,), {})
    # Left out alone, the first two would only lead to the refusal of the group that Ascend's engine opens.
    assert str(error.value).endswith(
        " VERL_FL_DISABLE=flagcx.checkpoint_engine,flagcx.checkpoint_engine_class,flagcx.stateless_group"
    )
    assert wrapper(lambda backend: backend, None, ("naive",), {}) == "naive"
    flagcx.stop()
    assert wrapper(lambda backend: backend, None, (engine,), {}) == engine


def test_it_is_off_unless_asked_for():
    assert reason_off("flagcx", Settings.from_environment({"FLAGCX_PATH": "/"})) == "USE_FLAGCX is not on"
    assert reason_off("flagcx", Settings.from_environment({"USE_FLAGCX": "1"})) == ""
    cpu = {"USE_FLAGCX": "1", "VERL_FL_DEVICE": "cpu"}
    assert reason_off("flagcx", Settings.from_environment(cpu)) == "VERL_FL_DEVICE=cpu: a CPU communicates through gloo"
