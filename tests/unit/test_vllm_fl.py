"""The plugins' configuration files: what a plugin would swallow is told, and the environment becomes a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm_plugin import FINDERS, METAX

from verl_fl_overlay import events
from verl_fl_overlay.cli import main
from verl_fl_overlay.dispatch import file as dispatch_file
from verl_fl_overlay.dispatch import lint
from verl_fl_overlay.dispatch.render import render
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.features import reason_off
from verl_fl_overlay.features.rollout import Rollout
from verl_fl_overlay.settings import TABLE, Settings, plugins
from verl_fl_overlay.settings.plugins import SGLANG, VLLM

yaml = pytest.importorskip("yaml")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    for module in (dispatch_file, plugins, lint):
        monkeypatch.setattr(module, "folders", lambda name: [])
    monkeypatch.setattr(plugins, "source", lambda path: None)
    monkeypatch.setattr(lint, "find_spec", lambda name: None)
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)


def test_the_shipped_file_has_no_faults_and_names_every_key(capsys):
    assert main(["dispatch", "check", str(dispatch_file.EXAMPLE)]) == 0
    assert capsys.readouterr().out == f"{dispatch_file.EXAMPLE}: no faults\n"
    text = dispatch_file.EXAMPLE.read_text()
    assert [key for key in VLLM.keys if f"{key}:" not in text] == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("allow_vendors: 3", "allow_vendors: a int is ignored; write a list"),
        ("op_backends: {3: flagos}", "op_backends: 3 is no dispatched operator of vllm-plugin-FL that is known here"),
        ("prefer: nvidia", "prefer: 'nvidia' is taken for flagos; allowed is one of flagos, vendor, reference"),
        ('strict: "false"', "strict: 'false' is taken for True; write true or false, without quotes"),
        ("allow_vendors: [CUDA]", "allow_vendors: 'CUDA' matches no vendor; write 'cuda', names are in lower case"),
        ("op_backends: [rms_norm]", "op_backends: a list is ignored; write a mapping, operator: [flagos, vendor, ...]"),
        (
            "op_backends: {rmsnorm: [flagos]}",
            "op_backends: rmsnorm is no dispatched operator of vllm-plugin-FL that is known here; rms_norm?",
        ),
        ("op_backends: {rms_norm: [flagsos]}", "op_backends: rms_norm: 'flagsos' matches nothing; flagos?"),
        ("op_backends: {rms_norm: vendor|default}", "op_backends: rms_norm: 'default' matches nothing"),
        (
            "op_backends: {rms_norm: ['vendor:CUDA']}",
            "op_backends: rms_norm: 'vendor:CUDA' matches no vendor; write vendor:cuda",
        ),
        (
            "op_backends: {rms_norm: 1}",
            "op_backends: rms_norm: a int is ignored; write a list such as [flagos, vendor]",
        ),
        ("flagos_blacklist: mm,softmax", "flagos_blacklist: a str is ignored; write a list"),
        ("flagos_blacklist: [rmsnorm]", "flagos_blacklist: FlagGems has no function rmsnorm; it is called rms_norm"),
        (
            "flagos_whitelist: [mm.out]",
            "flagos_whitelist: mm.out is torch's name; FlagGems' function is meant, without what follows the dot",
        ),
        (
            "{flagos_whitelist: [mm], flagos_blacklist: [softmax]}",
            "flagos_whitelist and flagos_blacklist are both there; keep one of them",
        ),
        (
            "oot_blacklist: [rmsnorm]",
            "oot_blacklist: rmsnorm is no replaced operator of vllm-plugin-FL that is known here; rms_norm?",
        ),
    ],
)
def test_a_fault_is_told(tmp_path, capsys, text, finding):
    file = tmp_path / "dispatch.yaml"
    file.write_text(text)
    assert main(["dispatch", "check", str(file)]) == 1
    assert capsys.readouterr().out == finding + "\n"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("prefre: vendor", "note: prefre: vllm-plugin-FL, as it is known here, has no such key; prefer?"),
        ("7: x", "note: 7: vllm-plugin-FL, as it is known here, has no such key"),
    ],
)
def test_a_key_of_a_newer_plugin_is_a_note(tmp_path, capsys, text, note):
    file = tmp_path / "dispatch.yaml"
    file.write_text(text)
    assert main(["dispatch", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{note}\n{file}: no faults\n"


# What tells the versions of vllm-plugin-FL apart, as its source has it: which operators it replaces ...
REPLACED = {
    "v0.1.0": 'OOT_OPS = {"rms_norm": (RMSNormFL, "RMSNorm"), "fused_moe": (FusedMoEFL, "FusedMoE")}',
    "without fused_moe": """
OOT_OPS = {"rms_norm": (RMSNormFL, "RMSNorm"), "unquantized_fused_moe_method": (M, "M")}
def register_oot_ops():
    if current_platform.device_type == "npu":
        apply()
""",
    "for vLLM 0.28": """
OOT_OPS = {
    "rms_norm": (RMSNormFL, "RMSNorm"),  # "fused_moe": (FusedMoEFactoryFL, "FusedMoEFactory"),
}
def register_oot_ops():
    if "fused_moe" not in (blacklist or []):
        _patch_fused_moe_factory()
""",
}

# ... and for which it chooses an implementation.
REGISTERED = """
def register_builtins(registry):
    for op_name in ("rms_norm", "an_operator_of_a_newer_version"):
        registry.register(OpImpl(op_name=op_name, impl_id="reference.torch"))
    registry.register(OpImpl(op_name="causal_conv1d_fn", vendor="kunlunxin"))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that makes a package of its files' texts."""
    monkeypatch.undo()
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def write(package, **files):
        for path, text in {"__init__.py": "raise ImportError('it is only read')", **files}.items():
            file = tmp_path / package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / package

    return write


@pytest.mark.parametrize(
    ("version", "finding"),
    [
        ("v0.1.0", []),
        ("for vLLM 0.28", []),
        (
            "without fused_moe",
            ["note: oot_blacklist: the vllm-plugin-FL that is installed has no replaced operator fused_moe"],
        ),
    ],
)
def test_replaced_operators_are_those_of_the_installed_version(installed, version, finding):
    installed("vllm_fl", **{"ops/custom_ops.py": REPLACED[version]})
    assert lint.check({"oot_blacklist": ["rms_norm", "fused_moe"]}) == finding
    assert lint.check({"oot_blacklist": ["npu"]}) == [
        "oot_blacklist: npu is no replaced operator of vllm-plugin-FL that is known here"
    ]


def test_dispatched_operators_are_those_of_the_installed_version(installed):
    installed(
        "vllm_fl",
        **{
            "dispatch/backends/reference/register_ops.py": REGISTERED,
            "dispatch/backends/vendor/broken/register_ops.py": "def of another Python",
        },
    )
    order = ["flagos"]
    assert lint.check({"op_backends": {"an_operator_of_a_newer_version": order, "causal_conv1d_fn": order}}) == []
    assert lint.check({"op_backends": {"topk_softmax": order, "rmsnorm": order}}) == [
        "note: op_backends: the vllm-plugin-FL that is installed has no dispatched operator topk_softmax",
        "op_backends: rmsnorm is no dispatched operator of vllm-plugin-FL that is known here; rms_norm?",
    ]


def test_the_plugins_own_files_are_clean_without_the_plugin():
    """Kunlunxin's and Hopper's name operators that only a vendor has."""
    vendors = ["vendor", "reference"]
    own = ("chunk_gated_delta_rule_fwd", "fused_recurrent_gated_delta_rule_fwd", "causal_conv1d_fn")
    own += ("causal_conv1d_update", "fused_gdn_gating", "apply_rotary_emb")
    assert lint.check({"op_backends": dict.fromkeys(own, vendors), "oot_blacklist": list(VLLM.replaced)}) == []
    assert lint.check({"op_backends": {"topk": ["flagos"]}, "oot_blacklist": ["TopK"]}, SGLANG) == []


def test_classes_and_keys_of_sglangs_plugin(installed):
    text = "_BRIDGE_MAP = {SiluAndMul: a, NewClass: b}\n_CLASS_TO_OP = {'SiluAndMul': 'silu_and_mul'}"
    installed("sglang_fl", **{"__init__.py": text})
    content = {"flagos_whitelist": ["mm"], "oot_blacklist": ["NewClass", "RMSNorm", "rms_norm"]}
    assert lint.check(content, SGLANG) == [
        "note: flagos_whitelist: sglang-plugin-FL, as it is known here, has no such key; flagos_blacklist?",
        "note: oot_blacklist: the sglang-plugin-FL that is installed has no replaced operator RMSNorm",
        "oot_blacklist: rms_norm is no replaced operator of sglang-plugin-FL that is known here",
    ]


@pytest.mark.parametrize("version", ["older", "newer"])
def test_lists_in_a_file_are_told_where_they_are_not_read(installed, tmp_path, monkeypatch, capsys, version):
    own = installed("vllm_fl", **{"dispatch/config/utils.py": FINDERS[version], "dispatch/config/metax.yaml": METAX})
    mine = tmp_path / "mine.yaml"
    mine.write_text("{prefer: flagos, flagos_blacklist: [mm, sort], oot_blacklist: [rms_norm]}")
    found = [
        "flagos_blacklist: the vllm-plugin-FL that is installed reads no lists from the file of VLLM_FL_CONFIG; export "
        "VLLM_FL_FLAGOS_BLACKLIST=mm,sort",
        "oot_blacklist: the vllm-plugin-FL that is installed reads no lists from the file of VLLM_FL_CONFIG; export "
        "VLLM_FL_OOT_BLACKLIST=rms_norm",
    ]
    assert main(["dispatch", "check", str(mine)]) == (version == "older")
    assert capsys.readouterr().out.splitlines() == (found if version == "older" else [f"{mine}: no faults"])
    assert main(["dispatch", "check", str(own / "dispatch/config/metax.yaml")]) == 0
    monkeypatch.setenv("GEMS_VENDOR", "metax")
    monkeypatch.setenv("VLLM_FL_FLAGOS_BLACKLIST", "mm")
    advice = {
        "older": "# Keep VLLM_FL_FLAGOS_BLACKLIST: this vllm-plugin-FL does not read them from a file.",
        "newer": "# Unset VLLM_FL_FLAGOS_BLACKLIST: set, they go before this file.",
    }
    assert render(Settings.from_environment()).splitlines()[1] == advice[version]
    monkeypatch.setenv("VLLM_FL_CONFIG", str(mine))
    files, read = dispatch_file.configured(VLLM, Settings.from_environment())
    assert files == [mine if version == "newer" else own / "dispatch/config/metax.yaml"]
    assert read["flagos_blacklist"] == (["mm", "sort"] if version == "newer" else ["copy_", "index"])


def test_for_long_contexts_on_hopper_both_of_nvidias_lists_count(installed, monkeypatch):
    """The card decides which file the plugin takes, and nothing here may start the card."""
    own = installed(
        "vllm_fl",
        **{
            "dispatch/config/nvidia.yaml": "flagos_blacklist: [copy_, clamp]",
            "dispatch/config/nvidia_hopper.yaml": "{op_backends: {mm: [vendor]}, flagos_blacklist: [copy_, mm]}",
        },
    )
    monkeypatch.setenv("GEMS_VENDOR", "nvidia")
    monkeypatch.setenv("VLLM_FL_FLAGOS_BLACKLIST", "sort")
    assert dispatch_file.configured(VLLM, Settings.from_environment())[1]["flagos_blacklist"] == ["copy_", "clamp"]
    monkeypatch.setenv("VLLM_FL_HOPPER_LONG_CONTEXT_OPT", "1")
    files, read = dispatch_file.configured(VLLM, Settings.from_environment())
    assert [file.name for file in files] == ["nvidia.yaml", "nvidia_hopper.yaml"]
    assert read["flagos_blacklist"] == ["copy_", "clamp", "mm"]
    assert f"defaults from {own / 'dispatch/config/nvidia_hopper.yaml'}" in render(Settings.from_environment())


def test_a_file_of_the_device_is_no_other_vendors(installed):
    """Hygon's torch calls the device cuda too; the file of that name was NVIDIA's."""
    installed("vllm_fl", **{"dispatch/config/cuda.yaml": "prefer: flagos"})
    assert dispatch_file.defaults(VLLM, "hygon", Settings())[0] == {}


@pytest.mark.parametrize(
    ("environment", "vendor"),
    [
        ({"VERL_PLATFORM": "mthreads"}, "mthreads"),
        ({"VERL_PLATFORM": "huawei"}, "ascend"),
        ({"VERL_PLATFORM": "musa", "GEMS_VENDOR": "nvidia"}, "mthreads"),
        ({"GEMS_VENDOR": "thead"}, "thead"),
        ({"PPU_SDK": "/usr/local/PPU_SDK", "GEMS_VENDOR": "nvidia"}, "thead"),
    ],
)
def test_the_chosen_chip_is_rendered(monkeypatch, capsys, environment, vendor):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert main(["dispatch", "render"]) == 0
    assert capsys.readouterr().out.startswith(
        f"# vllm-plugin-FL's configuration for {vendor}, by verl-fl dispatch render;"
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"GEMS_VENDOR": "aipu"}, "GEMS_VENDOR=aipu is no vendor that is known here"),
        ({"VERL_PLATFORM": "nobody"}, "VERL_PLATFORM=nobody is no chip that is known here"),
        ({"VERL_FL_DEVICE": "cpu"}, "VERL_FL_DEVICE=cpu"),
    ],
)
def test_without_a_chip_no_other_vendors_file_is_rendered(monkeypatch, capsys, environment, reason):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert main(["dispatch", "render"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"verl-fl dispatch render: for which chip? {reason}; name its vendor: --vendor, one of ")


def test_the_file_of_op_config_goes_before_per_op(tmp_path):
    """As in the plugin where no VLLM_FL_CONFIG takes the place of both."""
    (tmp_path / "ops.json").write_text('{"rms_norm": "vendor", "silu_and_mul": "flagos|reference"}')
    environment = {"VLLM_FL_OP_CONFIG": str(tmp_path / "ops.json"), "VLLM_FL_PER_OP": "rms_norm=flagos;moe_sum=flagos"}
    content = yaml.safe_load(render(Settings.from_environment(environment), "metax"))
    order = {"rms_norm": ["vendor"], "moe_sum": ["flagos"], "silu_and_mul": ["flagos", "reference"]}
    assert content["op_backends"] == order


def test_sglangs_environment_becomes_a_file(installed, monkeypatch, capsys):
    """Its variables go before the file, its whitelist has no key there, and its chips go by torch's device."""
    installed("sglang_fl", **{"dispatch/config/nvidia.yaml": "{prefer: flagos, flagos_blacklist: [sort]}"})
    monkeypatch.setenv("SGLANG_FL_STRICT", "0")
    monkeypatch.setenv("SGLANG_FL_FLAGOS_WHITELIST", "mm")
    monkeypatch.setenv("SGLANG_FL_OOT_BLACKLIST", "TopK")
    assert main(["dispatch", "render", "--engine", "sglang", "--vendor", "metax"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1:3] == [
        "# Unset SGLANG_FL_OOT_BLACKLIST, SGLANG_FL_STRICT: set, they go before this file.",
        "# Keep SGLANG_FL_FLAGOS_WHITELIST: this sglang-plugin-FL does not read them from a file.",
    ]
    own = {"prefer": "flagos", "flagos_blacklist": ["sort"]}
    assert yaml.safe_load(text) == {**own, "strict": False, "oot_blacklist": ["TopK"]}


def test_names_are_compared_with_the_installed_flaggems(tmp_path, monkeypatch):
    (tmp_path / "flag_gems").mkdir()
    (tmp_path / "flag_gems/__init__.py").write_text('_FULL_CONFIG = (("mm", mm), ("mm.out", ops.mm_out, 1))')
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert lint.flaggems_names() == {"mm", "mm_out"}
    (tmp_path / "flag_gems/__init__.py").write_text("")  # read once: it is long, and asked for with every name
    assert lint.check({"flagos_whitelist": ["mm_out", "mm_uot"]}) == [
        "flagos_whitelist: the FlagGems that is installed has no function mm_uot; mm_out?"
    ]
    assert lint.check({"flagos_blacklist": ["mm_out", "mm_uot"]}) == [
        "note: flagos_blacklist: the FlagGems that is installed has no function mm_uot; mm_out?"
    ]


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
NO_VALUE = "holds a value that is none of its type"
TWICE = "says prefer twice, and only the last counts; keep one of them"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "uses YAML's aliases (*name), which a dispatch file does not need; spell them out"),
        (b"- a", "holds a list; expected is a mapping, such as prefer: flagos"),
        (b"prefer: vendor\nprefer: flagos", TWICE),
        (b"op_backends: {prefer: [flagos], prefer: [vendor]}", TWICE),
        (b"flagos_blacklist: [{prefer: 1, prefer: 2}]", TWICE),
        (b"a: 2024-13-01", f"{NO_VALUE}: ValueError: month must be in 1..12"),
        (b"a: !!int abc", f"{NO_VALUE}: ValueError: invalid literal for int() with base 10: 'abc'"),
        (b"a: 0x_", f"{NO_VALUE}: ValueError: invalid literal for int() with base 16: ''"),
        (b"a: !!bool maybe", f"{NO_VALUE}: KeyError: 'maybe'"),
        (b"a: !!int ''", f"{NO_VALUE}: IndexError: string index out of range"),
        (b"a: !!timestamp now", f"{NO_VALUE}: AttributeError: 'NoneType' object has no attribute 'groupdict'"),
        (b"#" * (dispatch_file.LARGEST + 1), "is too long; a dispatch file has at most 65536 bytes"),
        (b"[" * 60_000, "is nested more than 8 levels deep, which a dispatch file is not"),
        (b"a: [", "cannot be read as YAML: while parsing"),
        (b"\xff\xfe\x00", "cannot be read as YAML: "),
        (b"a: !!python/object/apply:os.system [ls]", "cannot be read as YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_dispatch_file_is_refused(tmp_path, content, message):
    file = tmp_path / "dispatch.yaml"
    file.write_bytes(content)
    with pytest.raises(OverlayError) as error:
        dispatch_file.read(file)
    told = str(error.value)
    assert (
        told[: len(f"{file} {message}")] if "YAML: " in message else told
    ) == f"{file} {message}"  # PyYAML's own end


def test_a_file_that_never_ends_is_refused():
    with pytest.raises(OverlayError, match=r"^/dev/zero is too long; a dispatch file has at most 65536 bytes$"):
        dispatch_file.read(Path("/dev/zero"))


def test_a_vendor_that_nobody_knows_is_an_error(capsys):
    assert main(["dispatch", "render", "--vendor", "nvida"]) == 2
    assert capsys.readouterr().err.startswith(
        "verl-fl dispatch render: 'nvida' is no vendor that is known here: ascend, mthreads, "
    )


def test_lists_that_are_none_are_rendered_as_the_plugin_reads_them(tmp_path):
    (tmp_path / "mine.yaml").write_text("{flagos_blacklist: mm, oot_blacklist: [{a: b}], op_backends: [rms_norm]}")
    environment = {
        "VLLM_FL_CONFIG": str(tmp_path / "mine.yaml"),
        "VLLM_FL_FLAGOS_BLACKLIST": "softmax",
        "VLLM_FL_OOT_BLACKLIST": "rms_norm",
        "VLLM_FL_PER_OP": "rms_norm=vendor",
    }
    assert yaml.safe_load(render(Settings.from_environment(environment))) == {
        "flagos_blacklist": ["softmax"],
        "oot_blacklist": ["{'a': 'b'}", "rms_norm"],
        "op_backends": {"rms_norm": ["vendor"]},
    }


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["dispatch", "check", str(tmp_path / "no.yaml")]) == 1
    assert "no.yaml cannot be read as YAML: [Errno 2] No such file" in capsys.readouterr().out


def test_the_environment_becomes_a_file_that_extends_the_chips_own_lists(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_FL_FLAGOS_BLACKLIST", "softmax,copy_")
    monkeypatch.setenv("VLLM_FL_PER_OP", "rms_norm=vendor:cuda|flagos")
    monkeypatch.setenv("VLLM_FL_STRICT", "1")
    assert main(["dispatch", "render", "--vendor", "nvidia"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1] == "# Unset VLLM_FL_FLAGOS_BLACKLIST: set, they go before this file."
    content, shipped = yaml.safe_load(text), yaml.safe_load(dispatch_file.EXAMPLE.read_text())
    assert content["flagos_blacklist"] == [*shipped["flagos_blacklist"], "softmax"]
    assert content["op_backends"] == {**shipped["op_backends"], "rms_norm": ["vendor:cuda", "flagos"]}
    assert content["strict"] is True
    assert lint.check(content) == []


def test_a_whitelist_stands_alone():
    settings = Settings.from_environment({"VLLM_FL_FLAGOS_WHITELIST": "mm", "VLLM_FL_PREFER": "vendor"})
    content = yaml.safe_load(render(settings, "nvidia"))
    assert content["flagos_whitelist"] == ["mm"]
    assert "flagos_blacklist" not in content
    assert content["prefer"] == "vendor"


def test_the_plugins_own_configuration_goes_before_the_example(tmp_path, monkeypatch):
    (tmp_path / "vllm_fl/dispatch/config").mkdir(parents=True)
    (tmp_path / "vllm_fl/__init__.py").write_text("raise ImportError('it must not be imported')")
    (tmp_path / "vllm_fl/dispatch/config/ascend.yaml").write_text("flagos_blacklist: [sort]")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    settings = Settings.from_environment({"VLLM_FL_FLAGOS_BLACKLIST_APPEND": "mm"})
    assert yaml.safe_load(render(settings, "ascend")) == {"flagos_blacklist": ["sort", "mm"]}


def test_the_file_of_the_environment_goes_before_the_plugins_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("{prefer: vendor, flagos_blacklist: [mm]}")
    mine = {"VLLM_FL_CONFIG": str(tmp_path / "mine.yaml"), "VLLM_FL_FLAGOS_BLACKLIST": "softmax,mm"}
    content = yaml.safe_load(render(Settings.from_environment(mine)))
    assert content == {"prefer": "vendor", "flagos_blacklist": ["mm", "softmax"]}


@pytest.mark.parametrize(("text", "vendor"), [("", []), ("flagos_blacklist: [mm]", ["--vendor", "nvidia"])])
def test_a_named_vendor_and_an_empty_file_of_the_environment_leave_the_defaults(
    tmp_path, monkeypatch, capsys, text, vendor
):
    """Empty is what ``dispatch render > $VLLM_FL_CONFIG`` finds there: the shell has made it so."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    monkeypatch.setenv("VLLM_FL_CONFIG", str(file))
    monkeypatch.setenv("GEMS_VENDOR", "nvidia")
    assert main(["dispatch", "render", *vendor]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(dispatch_file.EXAMPLE.read_text())


def test_musas_configuration_goes_by_the_devices_name(tmp_path, monkeypatch):
    (tmp_path / "vllm_fl/dispatch/config").mkdir(parents=True)
    (tmp_path / "vllm_fl/__init__.py").write_text("")
    (tmp_path / "vllm_fl/dispatch/config/musa.yaml").write_text("flagos_blacklist: [sort]")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert dispatch_file.defaults(VLLM, "mthreads", Settings())[0] == {"flagos_blacklist": ["sort"]}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A file of VLLM_FL_CONFIG that cannot be read, a list beside it, and what is told of it."""
    file = tmp_path / "mine.yaml"
    file.write_bytes(BOMB.encode())
    monkeypatch.setenv("VLLM_FL_CONFIG", str(file))
    monkeypatch.setenv("VLLM_FL_OOT_BLACKLIST", "rms_norm")
    return f"{file} uses YAML's aliases (*name), which a dispatch file does not need; spell them out"


def test_a_configuration_that_cannot_be_read_leaves_the_lists_as_they_were(broken, monkeypatch):
    monkeypatch.setattr(events, "failures", events.Failures())
    rollout = Rollout(Settings.from_environment())
    rollout.start()
    try:
        events.rollout_plugin_found.emit("vllm_fl")
    finally:
        rollout.stop()
    assert os.environ["VLLM_FL_OOT_BLACKLIST"] == "rms_norm"
    assert list(events.failures.told().values()) == [f"OverlayError: {broken}"]


def test_a_configuration_that_cannot_be_read_is_refused_at_the_start_where_that_is_asked_for(broken, monkeypatch):
    """Not in the plugin, from which vLLM swallows every error: it would go on without any of FlagOS."""
    monkeypatch.setenv("VERL_FL_STRICT", "1")
    with pytest.raises(OverlayError) as error:
        Rollout(Settings.from_environment()).start()
    assert str(error.value) == broken


def test_where_the_environment_names_no_file_the_chips_own_is_not_read_either(tmp_path, monkeypatch):
    """As in the plugin, and as the warning about such a VLLM_FL_CONFIG says."""
    (tmp_path / "metax.yaml").write_text("oot_blacklist: [rotary_embedding]")
    monkeypatch.setattr(dispatch_file, "own_files", lambda plugin, chip, settings: [tmp_path / f"{chip.vendor}.yaml"])
    monkeypatch.setenv("GEMS_VENDOR", "metax")
    monkeypatch.setenv("VLLM_FL_OOT_BLACKLIST", "rms_norm")
    monkeypatch.setenv("VLLM_FL_CONFIG", str(tmp_path / "no.yaml"))
    rollout = Rollout(Settings())
    rollout.extend_lists("vllm_fl")
    assert os.environ["VLLM_FL_OOT_BLACKLIST"] == "rms_norm"
    monkeypatch.delenv("VLLM_FL_CONFIG")
    rollout.extend_lists("vllm_fl")
    assert os.environ["VLLM_FL_OOT_BLACKLIST"] == "rms_norm,rotary_embedding"


def test_without_a_list_there_is_nothing_to_extend():
    assert reason_off("rollout", Settings.from_environment({"VLLM_FL_FLAGOS_WHITELIST": "mm"})) == (
        "none of VLLM_FL_FLAGOS_BLACKLIST, VLLM_FL_OOT_BLACKLIST, SGLANG_FL_FLAGOS_BLACKLIST, SGLANG_FL_OOT_BLACKLIST "
        "is set"
    )
    assert reason_off("rollout", Settings.from_environment({"VLLM_FL_OOT_BLACKLIST": "rms_norm"})) == ""
