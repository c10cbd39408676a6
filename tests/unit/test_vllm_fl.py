"""vllm-plugin-FL's dispatch file: what the plugin would swallow is told, and the environment becomes a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from verl_fl_overlay import events
from verl_fl_overlay.cli import main
from verl_fl_overlay.dispatch import file as dispatch_file
from verl_fl_overlay.dispatch import lint
from verl_fl_overlay.dispatch.render import render
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.features import reason_off
from verl_fl_overlay.features.rollout import Rollout
from verl_fl_overlay.settings import TABLE, Settings

yaml = pytest.importorskip("yaml")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr(dispatch_file, "folders", lambda name: [])
    monkeypatch.setattr(lint, "find_spec", lambda name: None)
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)


def test_the_shipped_file_has_no_faults_and_names_every_key(capsys):
    assert main(["dispatch", "check", str(dispatch_file.EXAMPLE)]) == 0
    assert capsys.readouterr().out == f"{dispatch_file.EXAMPLE}: no faults\n"
    text = dispatch_file.EXAMPLE.read_text()
    assert [key for key in dispatch_file.KEYS if f"{key}:" not in text] == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("prefre: vendor", "prefre: the plugin has no such key and ignores it; prefer?"),
        ("7: x", "7: the plugin has no such key and ignores it"),
        ("allow_vendors: 3", "allow_vendors: a int is ignored; write a list"),
        ("op_backends: {3: flagos}", "op_backends: 3 is no operator of the dispatch that is known here"),
        ("prefer: nvidia", "prefer: 'nvidia' is taken for flagos; allowed is one of flagos, vendor, reference"),
        ('strict: "false"', "strict: 'false' is taken for True; write true or false, without quotes"),
        ("allow_vendors: [CUDA]", "allow_vendors: 'CUDA' matches no vendor; write 'cuda', names are in lower case"),
        ("op_backends: [rms_norm]", "op_backends: a list is ignored; write a mapping, operator: [flagos, vendor, ...]"),
        (
            "op_backends: {rmsnorm: [flagos]}",
            "op_backends: rmsnorm is no operator of the dispatch that is known here; rms_norm?",
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
            "oot_blacklist: [fused_moe]",
            "oot_blacklist: fused_moe has no effect; the operator is called unquantized_fused_moe_method",
        ),
        (
            "oot_blacklist: [rmsnorm]",
            "oot_blacklist: rmsnorm is none of vLLM's custom operators that are replaced; rms_norm?",
        ),
    ],
)
def test_a_fault_is_told(tmp_path, capsys, text, finding):
    file = tmp_path / "dispatch.yaml"
    file.write_text(text)
    assert main(["dispatch", "check", str(file)]) == 1
    assert capsys.readouterr().out == finding + "\n"


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


KEYS = ", ".join(dispatch_file.KEYS)
NO_VALUE = "holds a value that is none of its type"
TWICE = "says prefer twice, and only the last counts; keep one of them"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "uses YAML's aliases (*name), which a dispatch file does not need; spell them out"),
        (b"- a", f"holds a list; expected is a mapping with {KEYS}"),
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
    assert dispatch_file.defaults("mthreads")[0] == {"flagos_blacklist": ["sort"]}


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
        events.rollout_plugin_found.emit()
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
    monkeypatch.setattr(dispatch_file, "_configuration", lambda vendor: tmp_path / f"{vendor}.yaml")
    monkeypatch.setenv("GEMS_VENDOR", "metax")
    monkeypatch.setenv("VLLM_FL_OOT_BLACKLIST", "rms_norm")
    monkeypatch.setenv("VLLM_FL_CONFIG", str(tmp_path / "no.yaml"))
    rollout = Rollout(Settings())
    rollout.extend_lists()
    assert os.environ["VLLM_FL_OOT_BLACKLIST"] == "rms_norm"
    monkeypatch.delenv("VLLM_FL_CONFIG")
    rollout.extend_lists()
    assert os.environ["VLLM_FL_OOT_BLACKLIST"] == "rms_norm,rotary_embedding"


def test_without_a_list_there_is_nothing_to_extend():
    assert reason_off("rollout", Settings.from_environment({"VLLM_FL_FLAGOS_WHITELIST": "mm"})) == (
        "neither VLLM_FL_FLAGOS_BLACKLIST nor VLLM_FL_OOT_BLACKLIST is set"
    )
    assert reason_off("rollout", Settings.from_environment({"VLLM_FL_OOT_BLACKLIST": "rms_norm"})) == ""
