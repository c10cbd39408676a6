"""FlagGems that others enable: before the phase, inside it, between phases; seen, told with what it means, refused."""

from __future__ import annotations

import json
from pathlib import Path

import fabricated
import pytest
from processes import OVERLAY, before_others, output, run

pytest.importorskip("torch")

HERE = Path(__file__).parent

PROGRAM = """
import json, logging, os, sys
import torch
logging.basicConfig(stream=sys.stderr)
from verl_fl_overlay import events, phase
from verl_fl_overlay.features.enablers import Enablers
from verl_fl_overlay.features.flaggems import Routing
from verl_fl_overlay.flaggems.dispatcher import registered_in
from verl_fl_overlay.settings import Settings

def start(*, route=True, strict=False, **settings):
    events.failures.begin(strict)
    made = Settings.of(strict=strict, **settings)
    features = [Routing(made)] * route + [Enablers(made)]
    for feature in features:
        feature.start()
    return features

def holder(key):
    file = registered_in(key, "CPU")
    return "overlay" if file.endswith("routing.py") else "others" if "flag_gems" in file else "torch"

def gradient():
    a = torch.ones(2, 2, requires_grad=True)
    out = torch.where(a > 0, a, 0.5)
    if out.requires_grad:
        out.sum().backward()
    return a.grad is not None

def tell(**said):
    print(json.dumps(said))
"""


def seeing(folder: Path) -> dict[str, str]:
    """Return the environment in which a program finds the packages in ``folder``."""
    return before_others(folder, HERE)


def told(folder: Path, code: str) -> dict:
    return json.loads(output(PROGRAM + code, env=seeing(folder)))


@pytest.fixture(scope="module")
def gems(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gems")
    fabricated.flag_gems(folder)
    return folder


def test_enabled_before_the_phase(gems):
    said = told(
        gems,
        """
routing, enablers = start(ops=("mul", "mm"))
import flag_gems
flag_gems.enable(unused=["mm"])
with phase.training.inside("train"):
    inside = [holder("mm"), holder("mul.Tensor")]
    kept = gradient()
tell(inside=inside, kept=kept, after=[holder("mm"), holder("mul.Tensor")], enablers=enablers.describe(),
     routing=routing.describe(), problems=list(events.failures.told()))
""",
    )
    assert said["inside"] == ["overlay", "others"]
    assert said["after"] == ["torch", "others"]
    assert not said["kept"], "FlagGems' where cuts the gradient, whoever enabled it"
    assert set(said["enablers"]["harmful"]) == {"where.ScalarOther", "true_divide.Tensor"}
    assert len(said["enablers"]["held"]) == 7
    assert "7 operators" in said["enablers"]["state"]
    assert "2 of them cut or falsify gradients: true_divide.Tensor, where.ScalarOther" in said["enablers"]["state"]
    assert said["problems"] == ["keeping 7 operators of others' FlagGems (2 harmful) out of training"]
    assert said["routing"]["state"] == "native now, but 1 of the chosen operators are held by others"


INSIDE = """
routing, enablers = start(ops=("mul", "mm"))
import flag_gems
with phase.training.inside("train"):
    assert flag_gems.all_registered_keys() == ["mul.Tensor", "mm"]
    flag_gems.enable()
first = dict(enablers.describe()["held"])
after = [holder("mm"), holder("mul.Tensor"), holder("where.ScalarOther")]
with phase.training.inside("train"):
    second = [holder("mm"), holder("mul.Tensor")]
tell(first=list(first), after=after, second=second, routing=routing.describe(), enablers=enablers.describe())
"""


def test_enabled_inside_the_phase_native_is_told_truthfully_afterwards(gems):
    """torch <= 2.11 leaves our operators to us, newer ones put FlagGems' kernels of others over ours."""
    said = told(gems, INSIDE)
    over = said["after"][0] == "others"
    assert said["after"] == (["others"] * 3 if over else ["torch", "torch", "others"])
    assert ("mm" in said["first"]) is over
    assert said["second"] == (["others"] * 2 if over else ["overlay"] * 2)
    assert "where.ScalarOther" in said["enablers"]["harmful"]
    assert ("held by others" in said["routing"]["state"]) is over


def test_a_kernel_that_anybody_puts_over_ours_is_found_too(gems):
    said = told(
        gems,
        """
import inspect
newer = "allow_override" in inspect.signature(torch.library.Library.impl).parameters
options = {"allow_override": True} if newer else {}
(routing,) = start(ops=("mul", "mm"))[:1]
theirs = torch.library.Library("aten", "IMPL")
with phase.training.inside("train"):
    if newer:
        theirs.impl("mm", lambda a, b: a, "CPU", **options)
a = torch.ones(2, 2) * 2
told = routing.describe()
theirs._destroy()
with phase.training.inside("train"):
    again = holder("mm")
tell(newer=newer, told=told, mm=bool(torch.equal(a @ a, a @ a)), again=again, state=routing.describe()["state"])
""",
    )
    if said["newer"]:
        assert list(said["told"]["held by others"]) == ["mm"]
        assert "1 of the chosen operators are held by others" in said["told"]["state"]
    assert said["again"] == "overlay"
    assert said["state"] == "native now"


def test_enabled_between_phases_by_a_script_while_the_overlay_routes_nothing(gems):
    said = told(
        gems,
        """
(enablers,) = start(route=False)
with phase.training.inside("train"):
    pass
before = enablers.describe()
import flag_gems
with phase.training.inside("train"):
    pass
imported = enablers.describe()
flag_gems.only_enable(include=["mm"])
with phase.training.inside("train"):
    pass
harmless = enablers.describe()
flag_gems.only_enable(include=["where_scalar_other"], lib=torch.library.Library("aten", "IMPL"))
with phase.training.inside("train"):
    pass
tell(before=before, imported=imported, harmless=harmless["state"], harmful=enablers.describe()["harmful"],
     problems=list(events.failures.told()))
""",
    )
    assert said["before"] == said["imported"] == {"state": "nobody but the overlay has enabled FlagGems"}
    assert "none of them is known to cut or falsify a gradient" in said["harmless"]
    assert list(said["harmful"]) == ["where.ScalarOther"]
    assert said["problems"] == [
        "keeping 1 operators of others' FlagGems (0 harmful) out of training",
        "keeping 2 operators of others' FlagGems (1 harmful) out of training",
    ]


def test_a_use_that_ends_inside_the_phase_is_no_enabling(gems):
    said = told(
        gems,
        """
routing, enablers = start(ops=("mul", "mm"), strict=True)
import flag_gems
for _ in range(2):
    with phase.training.inside("train"):
        with flag_gems.use_gems():
            pass
        assert holder("mm") == "overlay"
tell(after=holder("mm"), enablers=enablers.describe(), note="current_work_registrar" in vars(flag_gems))
""",
    )
    assert said["after"] == "torch"
    assert said["enablers"]["state"] == "nobody but the overlay has enabled FlagGems"


def test_what_flaggems_registers_when_it_is_imported_is_nobodys_enabling(tmp_path):
    fabricated.flag_gems(tmp_path, vendor="thead", at_import=True)
    said = told(
        tmp_path,
        """
routing, enablers = start(ops=("mul", "mm"), strict=True)
with phase.training.inside("train"):
    pass
tell(routing=routing.describe(), enablers=enablers.describe())
""",
    )
    assert said["enablers"]["state"] == "nobody but the overlay has enabled FlagGems"
    (file,) = said["routing"]["held by others"].values()
    assert file.endswith("runtime/vendor.py")


def test_enabled_is_seen_where_torchs_own_note_of_it_is_lost(gems):
    """A use inside of an enabling takes torch's notes of both with it when it ends, and leaves the kernels."""
    said = told(
        gems,
        """
(enablers,) = start(route=False)
import flag_gems
flag_gems.only_enable(include=["mm"])
with flag_gems.use_gems():
    pass
with phase.training.inside("train"):
    pass
newer = (torch.library.Library.impl.__kwdefaults__ or {}).get("allow_override", False)
tell(held=enablers.describe()["held"], noted="aten/mm/CPU" in torch.library._impls, newer=newer)
""",
    )
    assert said["noted"] is not said["newer"], "torch <= 2.11 does not let the use register a second time"
    assert list(said["held"]) == ["mm"]


@pytest.mark.parametrize("when", ["before", "inside"])
def test_strict_refuses(gems, when):
    code = f"""
start(ops=("mul", "mm"), strict=True)
import flag_gems
if {when == "before"}:
    flag_gems.enable()
refused = []
for _ in range(2):
    try:
        with phase.training.inside("train"):
            flag_gems.enable()
            seen = holder("mm")
    except Exception as error:
        refused.append(f"{{type(error).__name__}}: {{error}}")
tell(refused=refused, active=phase.training.active)
"""
    said = told(gems, code)
    assert len(said["refused"]) == 2
    assert all("cut or falsify gradients" in text for text in said["refused"])
    assert not said["active"]


def test_what_the_user_let_through_is_not_harmful(gems):
    said = told(
        gems,
        """
(enablers,) = start(route=False, unsafe_ops=("aten::where.ScalarOther", "true_divide.Tensor"))
import flag_gems
flag_gems.enable()
with phase.training.inside("train"):
    pass
tell(**enablers.describe())
""",
    )
    assert said["harmful"] == {}


READ = """
routing, enablers = start(ops=("mul",))
import flag_gems
with phase.training.inside("train"):
    note = flag_gems.current_work_registrar
    natives = sorted(getattr(note, "torch_ops_map", {}))
    a = torch.ones(2)
    native = note.torch_ops_map["aten::mul.Tensor"] if natives else None
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    product = native.call_boxed(keys, a, a).tolist() if natives else None
    calls = flag_gems.stand_ins.calls["mul"]
tell(natives=natives, product=product, calls=calls, keys=note.all_keys, after=flag_gems.current_work_registrar is None,
     can=hasattr(torch.library, "get_kernel"))
"""


def test_kernels_of_cambricon_find_torchs_own_where_they_look_for_it(tmp_path):
    """They call ``current_work_registrar.torch_ops_map["aten::copy_"]`` in the hooks around a tuning."""
    fabricated.flag_gems(tmp_path, "5.0.2", "cambricon")
    said = told(tmp_path, READ)
    if said["can"]:
        assert said["natives"] == ["aten::mul.Tensor"]
        assert said["product"] == [1.0, 1.0]
    assert said["calls"] == 0, "torch's own was called, not the stand-in"
    assert said["after"]


@pytest.mark.parametrize("version", ["5.0.0", "5.4.0.dev20260810+g7fb49bad4"])
def test_the_note_of_what_is_registered_fits_every_version(tmp_path, version):
    fabricated.flag_gems(tmp_path, version)
    said = told(tmp_path, READ)
    assert said["keys"] == ["mul.Tensor"]
    assert said["natives"] == []
    assert said["after"]


ONE_STEP = """
routing, _ = start()
with phase.training.inside("train"):
    pass
"""


def test_a_version_that_cannot_be_is_told_and_used(tmp_path):
    """A vendor's image carries a FlagGems of September 2026 that says so of itself."""
    fabricated.flag_gems(tmp_path, "0.1.0")
    said = told(tmp_path, ONE_STEP + "tell(**routing.describe())")
    assert said["operators"] == 6
    assert said["version"] == "0.1.0"
    assert "says that it is version 0.1.0" in said["notes"][0]


def test_an_older_one_is_refused_whatever_version_it_names(tmp_path):
    fabricated.flag_gems(tmp_path, "5.3.4", before_five=True)
    result = run(
        "-c",
        PROGRAM + ONE_STEP.replace("start()", "start(strict=True)"),
        env=seeing(tmp_path),
    )
    assert result.returncode == 1
    assert "takes no registrar that can be asked for single operators" in result.stderr


def test_names_of_flagos_own_quick_start_in_a_blacklist_are_a_note(gems):
    said = told(
        gems,
        """
routing, _ = start(flagos_blacklist=("flash_attention", "mm", "rmsnorm"))
with phase.training.inside("train"):
    pass
tell(**routing.describe())
""",
    )
    assert "mm" not in said["routed"]
    assert [note.partition(":")[0] for note in said["notes"]] == [
        "TRAINING_FL_FLAGOS_BLACKLIST excludes nothing by 'flash_attention'",
        "TRAINING_FL_FLAGOS_BLACKLIST excludes nothing by 'rmsnorm'",
    ]
    assert "FlagGems calls it rms_norm" in said["notes"][1]


PLUGIN_PROGRAM = HERE / "plugin_engine.py"


@pytest.mark.parametrize("order", ["verl_fl_overlay,verl_hardware_plugin", "verl_hardware_plugin,verl_fl_overlay"])
def test_verl_hardware_plugin_beside_the_overlay(tiny_model, tmp_path, order):
    import verl
    from packaging.version import Version

    if Version(verl.__version__.partition(".dev")[0]) < Version("0.9.0"):
        pytest.skip("engines of a vendor came with verl 0.9")
    fabricated.flag_gems(tmp_path)
    fabricated.hardware_plugin(tmp_path)
    environment = {
        **OVERLAY,
        "VERL_USE_EXTERNAL_MODULES": order,
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_ENGINE_VENDOR": "flagos",
        "TRAINING_FL_FLAGGEMS_ENABLE": "1",
        **seeing(tmp_path),
    }
    result = run(PLUGIN_PROGRAM, tiny_model, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    said = json.loads(result.stdout.split("RESULT ")[-1])
    assert said["engine"] == "FSDPFlagOSEngineWithLMHead"
    enablers = said["report"]["features"]["enablers"]["detail"]
    assert "where.ScalarOther" in enablers["harmful"]
    assert "(verl_hardware_plugin)" in enablers["state"]
    assert "2 of them cut or falsify gradients" in enablers["state"]
    assert said["mm after"] == "others"
    assert said["report"]["features"]["flaggems"]["detail"]["operators"] == 0
    problems = "\n".join(said["report"]["problems"])
    assert "unset VERL_ENGINE_VENDOR" in problems
    assert "8 operators of others' FlagGems (2 harmful)" in problems
    strict = run(PLUGIN_PROGRAM, tiny_model, env={**environment, "VERL_FL_STRICT": "1"})
    assert strict.returncode == 1
    assert "VERL_ENGINE_VENDOR=flagos" in strict.stderr
