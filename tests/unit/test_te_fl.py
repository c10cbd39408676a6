"""TransformerEngine-FL told from NVIDIA's, its policy read anew for a Megatron engine; the package is a stand-in.

The real one answers the same questions in ``test_the_policy_is_what_the_environment_says`` where it is installed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import output

from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.events import Engine, engine_built, failures
from verl_fl_overlay.features import reason_off
from verl_fl_overlay.features.te_fl import TransformerEngineFL
from verl_fl_overlay.packages import flagos_builds
from verl_fl_overlay.settings import Settings

STAND_IN = Path(__file__).parents[1] / "te_fl_stand_in.py"


MEGATRON = Engine("megatron")


def built(settings):
    """Return the feature after a Megatron engine was built."""
    te_fl = TransformerEngineFL(settings)
    te_fl.built(MEGATRON)
    return te_fl


@pytest.fixture
def packages(tmp_path, monkeypatch):
    failures.begin(strict=False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("transformer_engine", "megatron"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    yield tmp_path
    for name in list(sys.modules):
        if name.split(".")[0] in ("transformer_engine", "megatron"):
            del sys.modules[name]


def make_fl(folder):
    (folder / "transformer_engine/plugin/core").mkdir(parents=True)
    (folder / "transformer_engine/pytorch").mkdir()
    (folder / "transformer_engine/pytorch/__init__.py").write_text("")
    (folder / "transformer_engine/plugin/__init__.py").write_text("")
    (folder / "transformer_engine/__init__.py").write_text("")
    (folder / "transformer_engine/plugin/core/__init__.py").write_text(STAND_IN.read_text())


def test_nvidias_packages_are_left_alone(packages):
    assert flagos_builds() == {"TransformerEngine-FL": False, "Megatron-LM-FL": False}
    assert reason_off("te_fl", Settings()) == "neither TransformerEngine-FL nor Megatron-LM-FL is installed"
    assert "transformer_engine" not in sys.modules


def test_megatron_fl_alone_is_told(packages):
    (packages / "megatron/plugin").mkdir()
    (packages / "megatron/plugin/decorators.py").write_text("")
    te_fl = built(Settings.from_environment({"MG_FL_PREFER": "metax"}))
    assert te_fl.describe() == {"TransformerEngine-FL": False, "Megatron-LM-FL": True, "MG_FL_PREFER": "metax"}


def register(core, *kinds):
    made = [core.OpImpl("probe", f"{kind.value}.probe", kind, lambda kind=kind: kind.value) for kind in kinds]
    core.get_default_manager().registry.register_many(made)


def test_a_megatron_engine_makes_the_policy_what_the_environment_says(packages, monkeypatch, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    register(core, core.BackendImplKind.DEFAULT, core.BackendImplKind.REFERENCE)
    assert core.get_policy().prefer == "flagos"
    monkeypatch.setenv("TE_FL_PREFER", "reference")
    assert core.get_policy().prefer == "flagos"
    te_fl = TransformerEngineFL(Settings.from_environment({"TE_FL_PREFER": "reference"}))
    te_fl.start()
    try:
        with caplog.at_level(logging.WARNING):
            engine_built.emit(Engine("fsdp"))
            assert core.get_policy().prefer == "flagos"
            engine_built.emit(MEGATRON)
            engine_built.emit(MEGATRON)
    finally:
        te_fl.stop()
    assert core.get_policy().prefer == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "TransformerEngine-FL failed and is skipped (VERL_FL_STRICT=1 raises it): OverlayError: it was imported before "
        "verl, so the overlay cannot mend its operators: import verl first",
        "a Megatron engine starts with TE_FL_PREFER=reference, and TransformerEngine-FL takes reference "
        "implementations first; export TE_FL_PREFER=flagos to be sure of those of FlagOS",
    ]


@pytest.mark.parametrize("asked", [True, False])
def test_one_whose_layers_cannot_be_imported_does_not_leave_the_field_in_silence(packages, caplog, asked):
    """``import transformer_engine`` swallows the error, and Megatron takes layers of its own."""
    make_fl(packages)
    (packages / "transformer_engine/pytorch/__init__.py").write_text("import onnxscript_that_is_missing")
    settings = Settings.from_environment({"TE_FL_PREFER": "flagos"} if asked else {})
    reason = "No module named 'onnxscript_that_is_missing'"
    if asked:
        with pytest.raises(SettingsError, match=reason):
            built(settings)
    else:
        built(settings)
        assert reason in caplog.records[0].getMessage()


def test_which_implementations_ran_is_counted_and_another_than_the_first_is_told(packages, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    manager = core.get_default_manager()
    register(core, core.BackendImplKind.DEFAULT, core.BackendImplKind.REFERENCE)
    manager._called_ops, manager.get_selected_impl_id = {"probe": "flagos.probe"}, lambda operator: "flagos.probe"
    te_fl = TransformerEngineFL(Settings())
    for ran in ("flagos.probe", "reference.probe", "reference.probe"):
        manager._called_ops["probe"] = ran
        te_fl.ran(manager, "probe")
    assert te_fl.describe()["operators that ran"] == {"probe": {"flagos.probe": 1, "reference.probe": 2}}
    assert [record.getMessage() for record in caplog.records] == [
        "probe of TransformerEngine-FL ran as reference.probe: flagos.probe goes first and failed, for the reason that "
        "TransformerEngine-FL logs; TE_FL_PER_OP=probe=impl:reference.probe asks for what runs, TE_FL_STRICT=0 raises "
        "instead"
    ]


def test_no_warning_where_flagos_is_asked_for_and_there(packages, monkeypatch, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    register(core, core.BackendImplKind.DEFAULT)
    monkeypatch.setenv("TE_FL_PREFER", "flagos")
    built(Settings.from_environment({"TE_FL_PREFER": "flagos"}))
    assert not caplog.records


def test_flagos_without_its_kernels_is_told(packages, monkeypatch, caplog):
    """TransformerEngine-FL registers them where flag_gems can be used, and goes on silently where not."""
    make_fl(packages)
    import transformer_engine.plugin.core as core

    register(core, core.BackendImplKind.REFERENCE)
    monkeypatch.setenv("TE_FL_PREFER", "flagos")
    te_fl = built(Settings.from_environment({"TE_FL_PREFER": "flagos"}))
    assert [record.getMessage() for record in caplog.records] == [
        "TransformerEngine-FL is to take flagos implementations first and has none here: a Megatron engine runs on "
        "reference; FlagOS' need flag_gems and a device that it knows"
    ]
    assert te_fl.describe()["implementations"] == {"reference": 1}


def test_one_that_does_not_tell_its_implementations_still_tells_its_policy(packages, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    del core.get_default_manager
    te_fl = built(Settings())
    assert [record.getMessage() for record in caplog.records] == [
        "a Megatron engine starts with TE_FL_PREFER not set, and TransformerEngine-FL takes flagos implementations "
        "first; export TE_FL_PREFER=flagos to be sure of those of FlagOS"
    ]
    assert te_fl.describe()["implementations"] is None


def test_one_that_cannot_register_its_implementations_still_tells_its_policy(packages, monkeypatch, caplog):
    make_fl(packages)
    import transformer_engine.plugin.core as core

    def no_chip(manager):
        raise RuntimeError("no chip")

    monkeypatch.setattr(core.Manager, "ensure_initialized", no_chip)
    with pytest.raises(RuntimeError, match="no chip"):
        built(Settings())
    assert len(caplog.records) == 1


PROBE = """
import json, os
import transformer_engine.plugin.core as core
from verl_fl_overlay.events import Engine
from verl_fl_overlay.features.te_fl import TransformerEngineFL
from verl_fl_overlay.settings import Settings

def fails():
    raise ValueError("as asked")

kind, impl = core.BackendImplKind, core.OpImpl
manager = core.get_default_manager()
manager.ensure_initialized()
manager.registry.register_many([
    impl("probe", "default.probe", kind.DEFAULT, lambda: "flagos"),
    impl("probe", "reference.probe", kind.REFERENCE, lambda: "reference"),
    impl("probe", "vendor.probe", kind.VENDOR, lambda: "CUDA", vendor="CUDA"),
    impl("faulty", "default.faulty", kind.DEFAULT, fails),
    impl("faulty", "reference.faulty", kind.REFERENCE, lambda: "reference"),
])

def call(op):
    try:
        return manager.call(op)
    except Exception as error:
        return type(error).__name__

found = {"before": call("probe")}
os.environ.update(ENVIRONMENT)
found["unread"] = call("probe")
te_fl = TransformerEngineFL(Settings.from_environment(os.environ))
te_fl.built(Engine("megatron"))
found.update(probe=call("probe"), told=te_fl.describe())
if "TE_FL_PER_OP" not in os.environ:
    found["faulty"] = call("faulty")
print(json.dumps(found))
"""


@pytest.fixture(params=["stand-in", "real"])
def path(request, tmp_path):
    """Return the PYTHONPATH on which a TransformerEngine-FL lies."""
    if request.param == "real":
        if not (find_spec("transformer_engine") and flagos_builds()["TransformerEngine-FL"]):
            pytest.skip("needs TransformerEngine-FL")
        return os.environ.get("PYTHONPATH", "")
    (tmp_path / "transformer_engine").mkdir()
    make_fl(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "flagos"),
        ({"TE_FL_PREFER": "reference"}, "reference"),
        ({"TE_FL_PREFER_VENDOR": "1"}, "CUDA"),
        ({"TE_FL_PREFER": "flagos", "TE_FL_PREFER_VENDOR": "1"}, "flagos"),
        ({"TE_FL_PREFER": "vendor", "TE_FL_ALLOW_VENDORS": "METAX"}, "flagos"),
        ({"TE_FL_PREFER": "vendor", "TE_FL_DENY_VENDORS": "MUSA,CUDA"}, "flagos"),
        ({"TE_FL_PER_OP": "probe=vendor:CUDA|flagos; other = reference"}, "CUDA"),
        ({"TE_FL_PER_OP": "probe=vendor:CUDA|flagos", "TE_FL_DENY_VENDORS": "CUDA"}, "flagos"),
        ({"TE_FL_PER_OP": "probe=impl:reference.probe"}, "reference"),
        ({"TE_FL_PER_OP": "probe=vendor:cuda|default"}, "RuntimeError"),
    ],
    ids=str,
)
def test_the_policy_is_what_the_environment_says(path, environment, expected):
    """By the implementation that runs; what it was before the environment was complete is forgotten."""
    program = PROBE.replace("ENVIRONMENT", repr(environment))
    found = json.loads(output(program, env={"PYTHONPATH": path, "TE_FL_SKIP_CUDA": "1"}))
    assert (found["before"], found["unread"], found["probe"]) == ("flagos", "flagos", expected)
    policy = found["told"]["policy"]
    assert policy["prefer"] == environment.get(
        "TE_FL_PREFER", "vendor" if environment.get("TE_FL_PREFER_VENDOR") else "flagos"
    )
    per_op = environment.get("TE_FL_PER_OP", "")
    assert policy["per_op"].get("probe", []) == (
        per_op.partition(";")[0].partition("=")[2].split("|") if per_op else []
    )


@pytest.mark.parametrize(("strict", "answer"), [(None, "reference"), ("1", "reference"), ("0", "ValueError")])
def test_what_strict_is_reported_to_do_is_what_it_does(path, strict, answer):
    program = PROBE.replace("ENVIRONMENT", repr({} if strict is None else {"TE_FL_STRICT": strict}))
    found = json.loads(output(program, env={"PYTHONPATH": path, "TE_FL_SKIP_CUDA": "1"}))
    assert found["faulty"] == answer
    assert found["told"]["policy"]["another implementation is tried when one fails"] == (answer == "reference")
