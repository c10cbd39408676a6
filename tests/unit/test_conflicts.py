"""Every rule between variables, with the message a user reads."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.conflicts import RULES, Remark, conflicts

CASES = {
    "_spelling": (
        {"USE_FLAGGEMS": "yes"},
        "USE_FLAGGEMS='yes' is on for verl-fl-overlay and off for vllm-plugin-FL, which takes only 1 and true for on; "
        "write USE_FLAGGEMS=1",
    ),
    "_spelling of FlagGems": (
        {"USE_C_EXTENSION": "true"},
        "USE_C_EXTENSION='true' is on for verl-fl-overlay and off for FlagGems, which takes only 1 for on; write "
        "USE_C_EXTENSION=1",
    ),
    "_rollout_without_flaggems": (
        {"VLLM_FL_PREFER": "vendor"},
        "VLLM_FL_PREFER=vendor also switches all of FlagGems off in rollout, whatever USE_FLAGGEMS says; to choose for "
        "the dispatched operators alone, set prefer in the file of VLLM_FL_CONFIG",
    ),
    "_training_lists": (
        {"TRAINING_FL_FLAGOS_WHITELIST": "softmax"},
        "TRAINING_FL_FLAGOS_WHITELIST has no effect: training uses FlagGems only with TRAINING_FL_FLAGGEMS_ENABLE=1 or "
        "USE_FLAGGEMS=1",
    ),
    "_two_enablers": (
        {"TRAINING_FL_FLAGGEMS_ENABLE": "1", "VERL_ENGINE_VENDOR": "flagos"},
        "VERL_ENGINE_VENDOR=flagos with TRAINING_FL_FLAGGEMS_ENABLE=1: the engines of verl-hardware-plugin enable "
        "FlagGems for the whole process, also the operators that cut gradients, and nobody can take them back; unset "
        "VERL_ENGINE_VENDOR, and the overlay alone routes FlagGems",
    ),
    "_flagcx asked": (
        {"USE_FLAGCX": "1"},
        "USE_FLAGCX is on without FLAGCX_PATH: training uses FlagCX if its torch plugin is installed, rollout "
        "(vllm-plugin-FL) goes by FLAGCX_PATH and does not; export FLAGCX_PATH=<the directory FlagCX was built in>",
    ),
    "_flagcx found": (
        {"FLAGCX_PATH": "BUILT"},
        "FLAGCX_PATH='BUILT' is set without USE_FLAGCX: rollout (vllm-plugin-FL) uses FlagCX, training (verl) does "
        "not; export USE_FLAGCX=1, or unset FLAGCX_PATH",
    ),
    "_flagcx not built": (
        {"USE_FLAGCX": "1", "FLAGCX_PATH": "/"},
        "FLAGCX_PATH='/' holds none of lib/libflagcx.so, build/lib/libflagcx.so, libflagcx.so; build FlagCX there",
    ),
    "_flagcx installed": (
        {"USE_FLAGCX": "1", "FLAGCX_PATH": "INSTALLED"},
        "FLAGCX_PATH='INSTALLED' holds no build/lib/libflagcx.so, the only place where rollout (vllm-plugin-FL) looks, "
        "and goes on without FlagCX's communicator when it is not there; training uses its libflagcx.so",
    ),
    "_flagcx missing": (
        {"USE_FLAGCX": "1", "FLAGCX_PATH": "/not/there"},
        "FLAGCX_PATH='/not/there' does not exist on this machine",
    ),
    "_flagcx as FlagCX reads it": (
        {"USE_FLAGCX": "1", "FLAGCX_PATH": "~/BUILT"},
        "FLAGCX_PATH='~/BUILT' does not exist on this machine",
    ),
    "_te_fl_vendors": (
        {"TE_FL_ALLOW_VENDORS": "nvidia"},
        "TE_FL_ALLOW_VENDORS names 'nvidia', which matches no vendor of TransformerEngine-FL; write CUDA, names are "
        "case-sensitive",
    ),
    "_te_fl_tokens vendor": (
        {"TE_FL_PER_OP": "rmsnorm_fwd=vendor:cuda|flagos"},
        "TE_FL_PER_OP: rmsnorm_fwd=vendor:cuda matches no implementation; write CUDA, names are case-sensitive",
    ),
    "_te_fl_tokens not its name": (
        {"TE_FL_PER_OP": "rmsnorm_fwd=vendor:NVIDIA"},
        "TE_FL_PER_OP: rmsnorm_fwd=vendor:NVIDIA matches no implementation; write CUDA, names are case-sensitive",
    ),
    "_te_fl_tokens default": (
        {"TE_FL_PER_OP": "rmsnorm_fwd=vendor:CUDA|default"},
        "TE_FL_PER_OP: rmsnorm_fwd=default matches no implementation; tokens are flagos, reference, vendor, "
        "vendor:<NAME>, impl:<id>",
    ),
    "_te_fl_strict": (
        {"TE_FL_STRICT": "1"},
        "TE_FL_STRICT=1 is read the other way round where TransformerEngine-FL calls an operator: it tries another "
        "implementation when one fails; 0 does the opposite",
    ),
    "_te_fl_prefer": (
        {"TE_FL_PREFER": "flagos", "TE_FL_PREFER_VENDOR": "1"},
        "TE_FL_PREFER_VENDOR has no effect: TE_FL_PREFER is set and goes before it; unset TE_FL_PREFER_VENDOR",
    ),
    "_config": (
        {"VLLM_FL_CONFIG": "/not/there.yaml"},
        "VLLM_FL_CONFIG='/not/there.yaml' is no file on this machine; vllm-plugin-FL goes on without a word, and "
        "without the chip's own configuration too",
    ),
    "_config as the plugin reads it": (
        {"VLLM_FL_CONFIG": "~/mine.yaml"},
        "VLLM_FL_CONFIG='~/mine.yaml' is no file on this machine; vllm-plugin-FL goes on without a word, and without "
        "the chip's own configuration too",
    ),
    "_policy vendors": (
        {"VLLM_FL_ALLOW_VENDORS": "CUDA"},
        "VLLM_FL_ALLOW_VENDORS: 'CUDA' matches no vendor; write 'cuda', names are in lower case",
    ),
    "_policy vendor": (
        {"VLLM_FL_PER_OP": "rms_norm=vendor:CUDA|flagos"},
        "VLLM_FL_PER_OP: rms_norm: 'vendor:CUDA' matches no vendor; write vendor:cuda",
    ),
    "_policy default": (
        {"VLLM_FL_PER_OP": "rms_norm=vendor:cuda|default"},
        "VLLM_FL_PER_OP: rms_norm: 'default' matches nothing",
    ),
    "_oplist_path": (
        {"ROLLOUT_FLAGGEMS_PATH": "/tmp/ops"},
        "ROLLOUT_FLAGGEMS_PATH is read by nothing; rollout reads FLAGGEMS_ENABLE_OPLIST_PATH",
    ),
    "_config covers": (
        {"VLLM_FL_CONFIG": "/proc/version", "VLLM_FL_PER_OP": "rms_norm=vendor"},
        "VLLM_FL_PER_OP is not read by the dispatch: VLLM_FL_CONFIG takes its place; write it into /proc/version",
    ),
    "_append": (
        {"VLLM_FL_FLAGOS_WHITELIST": "softmax", "VLLM_FL_FLAGOS_BLACKLIST_APPEND": "mm"},
        "VLLM_FL_FLAGOS_BLACKLIST_APPEND has no effect beside VLLM_FL_FLAGOS_WHITELIST; keep one of them",
    ),
    "_lists_alone": (
        {"VLLM_FL_FLAGOS_BLACKLIST": "softmax", "VERL_FL_DISABLE": "ray.init,rollout.lists"},
        "VLLM_FL_FLAGOS_BLACKLIST takes the place of the list in the chip's configuration, whose operators come back "
        "into use, since VERL_FL_DISABLE leaves rollout.lists out; name them too, or write the list into the file of "
        "VLLM_FL_CONFIG",
    ),
    "_lists_alone of SGLang": (
        {"SGLANG_FL_OOT_BLACKLIST": "TopK", "VERL_FL_DISABLE": "rollout.sglang_platform"},
        "SGLANG_FL_OOT_BLACKLIST takes the place of the list in the chip's configuration, whose operators come back "
        "into use, since VERL_FL_DISABLE leaves rollout.sglang_platform out; name them too, or write the list into the "
        "file of SGLANG_FL_CONFIG",
    ),
    "_lists_alone too": (
        {"VLLM_FL_OOT_BLACKLIST": "rms_norm", "VERL_FL_DISABLE": "*"},
        "VLLM_FL_OOT_BLACKLIST takes the place of the list in the chip's configuration, whose operators come back into "
        "use, since VERL_FL_DISABLE leaves rollout.lists out; name them too, or write the list into the file of "
        "VLLM_FL_CONFIG",
    ),
    "_config of operators": (
        {"VLLM_FL_CONFIG": "/proc/version", "VLLM_FL_OP_CONFIG": "ops.json"},
        "VLLM_FL_OP_CONFIG is not read by the dispatch: VLLM_FL_CONFIG takes its place; write it into /proc/version",
    ),
    "_config of SGLang": (
        {"SGLANG_FL_CONFIG": "/not/there.yaml"},
        "SGLANG_FL_CONFIG='/not/there.yaml' is no file on this machine; sglang-plugin-FL goes on without a word, and "
        "with the chip's own configuration",
    ),
    "_policy of SGLang": (
        {"SGLANG_FL_DENY_VENDORS": "CUDA"},
        "SGLANG_FL_DENY_VENDORS: 'CUDA' matches no vendor; write 'cuda', names are in lower case",
    ),
    "_replaced": (
        {"VLLM_FL_OOT_BLACKLIST": "rmsnorm"},
        "VLLM_FL_OOT_BLACKLIST: vllm-plugin-FL replaces no rmsnorm; rms_norm?",
    ),
    "_replaced of SGLang": (
        {"SGLANG_FL_OOT_WHITELIST": "rms_norm"},
        "SGLANG_FL_OOT_WHITELIST: sglang-plugin-FL replaces no rms_norm; RMSNorm?",
    ),
    "_unread": (
        {"VLLM_FL_IO_DUMP_TORCH_FUNCS": "1"},
        "VLLM_FL_IO_DUMP_TORCH_FUNCS is not read by vllm-plugin-FL's newest; write VLLM_FL_IO_DUMP_WITH_TORCH_FUNCS",
    ),
    "_sglang_strict": (
        {"SGLANG_FL_STRICT": "1"},
        "SGLANG_FL_STRICT=1 lets sglang-plugin-FL try another implementation when one fails; its README says the "
        "opposite",
    ),
    "_sglang_debug": (
        {"SGLANG_FL_DISPATCH_DEBUG": "1"},
        "SGLANG_FL_DISPATCH_DEBUG is read by nothing; sglang-plugin-FL writes its choices to SGLANG_FL_DISPATCH_LOG",
    ),
    "_plugins of SGLang": (
        {"SGLANG_PLUGINS": "mine", "SGLANG_FL_PREFER": "vendor"},
        "SGLANG_PLUGINS='mine' leaves sglang-plugin-FL out, so nothing reads SGLANG_FL_PREFER; add sglang_fl to "
        "SGLANG_PLUGINS",
    ),
    "_plugins by platform": (
        {"SGLANG_PLATFORM": "mine", "SGLANG_FL_PREFER": "vendor"},
        "SGLANG_PLATFORM='mine' leaves sglang-plugin-FL out, so nothing reads SGLANG_FL_PREFER; write "
        "SGLANG_PLATFORM=sglang_fl",
    ),
    "_te_fl_vendors by device": (
        {"TE_FL_DENY_VENDORS": "ascend"},
        "TE_FL_DENY_VENDORS names 'ascend', which matches no vendor of TransformerEngine-FL; write NPU, names are "
        "case-sensitive",
    ),
    "_te_fl_tokens by device": (
        {"TE_FL_PER_OP": "rmsnorm_fwd=vendor:ASCEND"},
        "TE_FL_PER_OP: rmsnorm_fwd=vendor:ASCEND matches no implementation; write NPU, names are case-sensitive",
    ),
    "_plugins": (
        {"VLLM_PLUGINS": "ascend", "VLLM_FL_OOT_ENABLED": "1"},
        "VLLM_PLUGINS='ascend' leaves vllm-plugin-FL out, so nothing reads VLLM_FL_OOT_ENABLED; add fl to VLLM_PLUGINS",
    ),
    "_relative": (
        {"VERL_FL_REPORT_DIR": "reports"},
        "VERL_FL_REPORT_DIR='reports' is a relative path, and every process takes it from the folder that it runs in, "
        "which is another one for Ray's workers; write an absolute one",
    ),
    "_external_modules": (
        {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay, mine,"},
        "VERL_USE_EXTERNAL_MODULES='verl_fl_overlay, mine,': verl cannot import names with blanks or empty ones; write "
        "'verl_fl_overlay,mine'",
    ),
}


@pytest.fixture(autouse=True)
def built(tmp_path, monkeypatch):
    """A build of FlagCX, as the folder BUILT, the home it lies in, a configuration and a plugin beside it."""
    library = tmp_path / "BUILT/build/lib/libflagcx.so"
    library.parent.mkdir(parents=True)
    library.write_text("")
    (tmp_path / "INSTALLED").mkdir()
    (tmp_path / "INSTALLED/libflagcx.so").write_text("")
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "ops.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "verl_hardware_plugin.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_a_conflict_is_told_with_what_to_do(case):
    environment, message = CASES[case]
    assert conflicts(Settings.from_environment(environment)) == [message]


@pytest.mark.parametrize(
    ("case", "stops"), [("asked", False), ("installed", False), ("found", True), ("not built", True)]
)
def test_what_only_rollout_does_not_do_stops_no_strict_training(case, stops):
    (conflict,) = conflicts(Settings.from_environment(CASES[f"_flagcx {case}"][0]))
    assert isinstance(conflict, Remark) is not stops


def test_a_plugin_that_torch_loaded_unasked_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "flagcx", ModuleType("flagcx"))
    (conflict,) = conflicts(Settings.from_environment({}))
    assert conflict == (
        "torch loaded FlagCX's plugin when it was imported, and USE_FLAGCX is not on: the plugin replaces "
        "torch.distributed.batch_isend_irecv for all backends, and gloo's then fails; export "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    )
    assert isinstance(conflict, Remark)
    assert conflicts(Settings.from_environment({"USE_FLAGCX": "1", "FLAGCX_PATH": "BUILT"})) == []


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in RULES} == {case.split()[0] for case in CASES}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"USE_FLAGGEMS": "1", "TRAINING_FL_FLAGOS_WHITELIST": "softmax"},
        {"USE_FLAGGEMS": "TRUE"},
        {"USE_FLAGGEMS": "1", "VERL_ENGINE_VENDOR": "flagos"},  # which verl-hardware-plugin does not read
        {"VLLM_FL_FLAGOS_BLACKLIST": "softmax", "VERL_FL_DISABLE": "ray.init"},
        {"VERL_FL_DISABLE": "*"},
        {"TE_FL_PREFER": "", "TE_FL_PREFER_VENDOR": "1"},
        {"USE_C_EXTENSION": "1"},
        {"USE_FLAGGEMS": "no", "VLLM_FL_PREFER": "vendor"},
        {"USE_FLAGCX": "1", "FLAGCX_PATH": "BUILT"},
        {"TE_FL_ALLOW_VENDORS": "CUDA,METAX", "TE_FL_PER_OP": "gemm=vendor:CUDA|impl:default.flagos;x=flagos"},
        {"VLLM_PLUGINS": "fl", "VLLM_FL_PER_OP": "rms_norm=vendor:cuda|flagos"},
        {"SGLANG_PLUGINS": "", "SGLANG_PLATFORM": "sglang_fl", "SGLANG_FL_OOT_BLACKLIST": "TopK,GemmaRMSNorm"},
        {"VLLM_FL_FLAGOS_BLACKLIST_APPEND": "mm", "VLLM_FL_OOT_BLACKLIST": "fused_moe"},
        {"TE_FL_ALLOW_VENDORS": "NPU"},
        {"VERL_USE_EXTERNAL_MODULES": "mine,verl_fl_overlay"},
    ],
)
def test_settings_that_do_what_they_say_are_left_in_peace(environment):
    assert conflicts(Settings.from_environment(environment)) == []


@pytest.mark.parametrize(
    "prefix", ["TRAINING_FL_FLAGOS", "VLLM_FL_FLAGOS", "VLLM_FL_OOT", "SGLANG_FL_FLAGOS", "SGLANG_FL_OOT"]
)
def test_both_lists_of_a_pair_are_an_error(prefix):
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({f"{prefix}_WHITELIST": "a", f"{prefix}_BLACKLIST": "b"})
    assert str(error.value).splitlines()[1:] == [
        f"  {prefix}_WHITELIST and {prefix}_BLACKLIST are both set: one list says what is used and the other what is "
        "not; keep one of them"
    ]


def package(folder, monkeypatch, path, text):
    """Make a package of one file beside its first one."""
    file = folder / path
    file.parent.mkdir(parents=True)
    (folder / path.split("/")[0] / "__init__.py").write_text("raise ImportError('it is only read')")
    file.write_text(text)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(("here", "write"), [("Ascend", "Ascend"), ("NPU", "NPU"), ("CUDA", "NPU")])
def test_te_fls_vendors_are_those_of_the_installed_version(tmp_path, monkeypatch, here, write):
    path = "transformer_engine/plugin/core/backends/vendor/some/register_ops.py"
    package(tmp_path, monkeypatch, path, f'OpImpl(op_name="gelu", vendor="{here}", priority=100)')
    told = conflicts(Settings.from_environment({"TE_FL_ALLOW_VENDORS": "ascend"}))
    assert told == [
        "TE_FL_ALLOW_VENDORS names 'ascend', which matches no vendor of TransformerEngine-FL; write "
        f"{write}, names are case-sensitive"
    ]
    assert conflicts(Settings.from_environment({"TE_FL_ALLOW_VENDORS": write})) == []


OLDER = "VLLM_FL_FLAGOS_BLACKLIST_APPEND is not read by the vllm-plugin-FL that is installed; newer versions read it"


@pytest.mark.parametrize(
    ("path", "text", "variable", "message"),
    [
        ("vllm_fl/utils.py", 'environ.get("VLLM_FL_FLAGOS_BLACKLIST")', "VLLM_FL_FLAGOS_BLACKLIST_APPEND", OLDER),
        ("vllm_fl/utils.py", 'environ.get("VLLM_FL_FLAGOS_BLACKLIST_APPEND")', "VLLM_FL_FLAGOS_BLACKLIST_APPEND", ""),
        ("vllm_fl/dispatch/io_dumper.py", "VLLM_FL_IO_DUMP_TORCH_FUNCS", "VLLM_FL_IO_DUMP_TORCH_FUNCS", ""),
        (
            "vllm_fl/dispatch/io_dumper.py",
            "VLLM_FL_IO_DUMP_TORCH_FUNCS",
            "VLLM_FL_IO_DUMP_WITH_METAS",
            "VLLM_FL_IO_DUMP_WITH_METAS is not read by the vllm-plugin-FL that is installed; newer versions read it",
        ),
        (
            "flag_gems/runtime/backend/device.py",
            'environ.get("GEMS_VENDOR")',
            "GEMS_BACKEND",
            "GEMS_BACKEND is not read by the FlagGems that is installed; it is read since 5.3.0",
        ),
        (
            "vllm_fl/dispatch/config/utils.py",
            "def get_config_path(): ...",
            "VLLM_FL_CONFIG",
            "VLLM_FL_CONFIG='lists.yaml' has lists of operators, and the vllm-plugin-FL that is installed reads none "
            "there; verl-fl dispatch check lists.yaml says what to export",
        ),
        ("vllm_fl/dispatch/config/utils.py", "", "VLLM_FL_CONFIG", ""),
    ],
)
def test_what_a_version_reads_is_asked_of_its_source(tmp_path, monkeypatch, path, text, variable, message):
    """Its version does not tell: vllm-plugin-FL has said 0.1.0 before and after."""
    package(tmp_path, monkeypatch, path, text)
    (tmp_path / "lists.yaml").write_text("prefer: vendor\nflagos_blacklist: [mm]\n")
    value = "lists.yaml" if variable == "VLLM_FL_CONFIG" else "1"
    assert conflicts(Settings.from_environment({variable: value})) == ([message] if message else [])
