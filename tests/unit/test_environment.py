"""The whole table: parsing, `verl-fl env`, and what another process is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import run

import verl_fl_overlay
from verl_fl_overlay import compat
from verl_fl_overlay.cli import main
from verl_fl_overlay.cli.env import as_exports, examine
from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.settings import TABLE, VARIABLES, Settings
from verl_fl_overlay.settings.loading import forwarded, kept_back
from verl_fl_overlay.settings.stack import PREFIXES, STACK
from verl_fl_overlay.settings.table import misspelt, shown
from verl_fl_overlay.settings.variables import MalformedError, json_file

ROOT = Path(verl_fl_overlay.__file__).parents[1]


def test_no_variable_has_two_rows():
    assert not {variable.name for variable in VARIABLES.values()} & set(STACK)


def test_every_row_is_filled():
    for variable in TABLE.values():
        assert variable.allowed
        assert variable.help
        assert variable.component
        assert variable.phase in ("training", "rollout", "common", "build")


def test_a_default_is_what_an_unset_variable_gives():
    settings = Settings.from_environment({})
    assert {name: settings[name] for name in TABLE} == {variable.name: variable.default for variable in TABLE.values()}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("USE_FLAGCX", " True ", True),
        ("USE_FLAGGEMS", "OFF", False),
        ("TE_FL_PREFER", "FlagOS", "flagos"),
        ("TEFL_LOG_LEVEL", "DEBUG", "debug"),
        ("VLLM_FL_FLAGOS_WHITELIST", " mm, softmax ,mm,", ("mm", "softmax")),
        ("VLLM_FL_PER_OP", "rms_norm=vendor:cuda|flagos; silu_and_mul = reference", None),
        ("TRAINING_FLAGGEMS_PATH", "/tmp/größe/算子.txt", "/tmp/größe/算子.txt"),
        ("TE_FL_SKIP_CUDA", "1", 1),
        ("VERL_FL_DEVICE", "", "auto"),
        ("VERL_FL_SCOPE", " ", "phase"),
        ("TE_FL_PREFER", "", "flagos"),
    ],
)
def test_values_are_read(name, text, value):
    if value is None:
        value = {"rms_norm": ("vendor:cuda", "flagos"), "silu_and_mul": ("reference",)}
    assert Settings.from_environment({name: text})[name] == value


def test_ten_thousand_names_are_read():
    names = tuple(f"op_{number}" for number in range(10_000))
    settings = Settings.from_environment({"VLLM_FL_FLAGOS_WHITELIST": ",".join(names)})
    assert settings["VLLM_FL_FLAGOS_WHITELIST"] == names


def test_all_malformed_values_are_told_at_once(tmp_path):
    file = tmp_path / "flagcx"
    file.write_text("")
    other = tmp_path / "list.json"
    other.write_text("[1]")
    with pytest.raises(SettingsError) as error:
        Settings.from_environment(
            {
                "USE_FLAGCX": '"1"',
                "FLAGCX_PATH": str(file),
                "TE_FL_PREFER": "nvidia",
                "TE_FL_PER_OP": "rmsnorm_fwd",
                "TE_FL_SKIP_CUDA": "yes",
                "VLLM_FL_OP_CONFIG": str(other),
                "VERL_FL_DEVICE": "gpu",
            }
        )
    assert str(error.value).splitlines() == [
        "verl-fl-overlay cannot use these settings:",
        "  VERL_FL_DEVICE='gpu': allowed is one of 'auto', 'cpu'",
        "  USE_FLAGCX='\"1\"': allowed is one of 1, true, yes, on, 0, false, no, off; the quotes are part of the "
        "value, take them away",
        f"  FLAGCX_PATH={str(file)!r}: allowed is a directory; this is a file",
        "  TE_FL_PREFER='nvidia': allowed is one of 'flagos', 'vendor', 'reference'",
        "  TE_FL_PER_OP='rmsnorm_fwd': allowed is op=token|token;op=token ...; the part 'rmsnorm_fwd' is not of that "
        "form",
        "  TE_FL_SKIP_CUDA='yes': allowed is a whole number",
        f"  VLLM_FL_OP_CONFIG={str(other)!r}: allowed is a JSON file of one object whose values are texts; this file "
        "holds something else",
    ]


def test_brackets_in_thousands_of_brackets_are_no_json_file(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(MalformedError, match="a JSON file; maximum recursion depth"):
        json_file(str(tmp_path / "deep.json"))


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("TRAINING_FLAGGEMS_PATH", "/", "a file, and this is a directory"),
        ("TRAINING_FL_FLAGOS_WHITELIST", " , ,", "names, comma-separated; there is none between the commas"),
        ("VERL_FL_OPS", "mm,ALL", "ALL alone, or names without it"),
        ("VERL_FL_FUSED", "rmsnorm", "auto, 0, or some of rms_norm, gated_mlp, experts, rotary, adam, comma-separated"),
        ("VERL_FL_RECOMPUTE", "-1", "all, none, auto, or how many layers of a model recompute, such as 12"),
        ("VERL_FL_RECOMPUTE", "³", "all, none, auto, or how many layers of a model recompute, such as 12"),
        ("VERL_FL_PROFILE", "/", "a file, and this is a directory"),
        (
            "VLLM_FL_OP_CONFIG",
            "/not/größe.json",
            "a JSON file; [Errno 2] No such file or directory: '/not/größe.json'",
        ),
        ("VERL_FL_SCOPE", "“phase”", "one of 'phase', 'process'"),
        ("TE_FL_SKIP_CUDA", "", "a whole number"),  # TransformerEngine-FL fails on it too
        ("TE_FL_STRICT", "'1'", "one of '0', '1'; the quotes are part of the value, take them away"),
    ],
)
def test_what_a_variable_allows_is_told(name, text, allowed):
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({name: text})
    assert str(error.value).splitlines()[1:] == [f"  {name}={text!r}: allowed is {allowed}"]


def test_a_malformed_value_is_not_also_a_conflict(tmp_path):
    file = tmp_path / "flagcx"
    file.write_text("")
    result = examine({"FLAGCX_PATH": str(file), "TE_FL_PREFER": "x", "TE_FL_PREFER_VENDOR": "1"})
    assert len(result["errors"]) == 2
    assert result["warnings"] == []


def test_a_default_that_is_a_list_is_shown_as_it_would_be_written():
    rows = {row["name"]: row["value"] for row in examine({})["variables"]}
    assert rows["VERL_FL_OPS"] == "auto"
    assert rows["VERL_FL_DISABLE"] == ""


def test_errors_beside_exports_are_lines_of_their_own(monkeypatch, capsys):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USE_FLAGCX", "maybe")
    assert main(["env", "--sh"]) == 1
    told = capsys.readouterr()
    assert told.out == "export USE_FLAGCX=maybe\nexport VERL_USE_EXTERNAL_MODULES=verl_fl_overlay\n"
    assert told.err == ("verl-fl env: USE_FLAGCX='maybe': allowed is one of 1, true, yes, on, 0, false, no, off\n")


def test_a_long_value_is_shortened_in_the_error():
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({"USE_FLAGCX": "x" * 100_000})
    assert len(str(error.value)) < 500
    assert "(100000 characters)" in str(error.value)


def test_misspelt_names_of_the_stack():
    assert misspelt({"TE_FL_PREFRE": "1", "VLLM_FL_FLAGOS_BLACKLISTS": "a", "ROLLOUT_FL_FLAGOS_WHITELIST": "a"}) == [
        "ROLLOUT_FL_FLAGOS_WHITELIST is read by nothing; rollout reads VLLM_FL_FLAGOS_WHITELIST",
        "TE_FL_PREFRE is no variable of the FlagOS stack that verl-fl-overlay knows; TE_FL_PREFER?",
        "VLLM_FL_FLAGOS_BLACKLISTS is no variable of the FlagOS stack that verl-fl-overlay knows; "
        "VLLM_FL_FLAGOS_BLACKLIST?",
    ]


def test_two_hundred_variables_that_only_the_components_know_are_given_on_in_silence():
    newer = {f"{prefix}NEWER_{number}": "1" for prefix in PREFIXES for number in range(20)}
    newer = {name: text for name, text in newer.items() if not name.startswith("ROLLOUT_FL_")}
    assert len(newer) > 200
    begun = time.process_time()
    assert misspelt(newer) == []
    assert forwarded(newer).items() >= newer.items()
    assert time.process_time() - begun < 0.5
    result = examine(newer)
    assert result["warnings"] == result["errors"] == []
    assert result["not in the table"] == newer


@pytest.mark.parametrize("name", ["SGLANG_FL_PREFER", "SGLANG_FLAGGEMS_RECORD", "GEMS_ARM_POW_PREWARM", "TE_FL_NEW"])
def test_each_component_s_own_beginning_is_known(name):
    assert forwarded({name: "1"})[name] == "1"


SECRETS = {
    "FLAGGEMS_DB_URL": "postgresql://user:secret@host/tuning",
    "FLAGGEMS_OTHER_URL": "postgresql://host/tuning?user=me&password=secret&ssl=1",
    "FLAGCX_STORE_TOKEN": "secret",
    "VLLM_FL_API_KEY": "secret",
    "SGLANG_FL_PASSWORD_FILE": "secret",
    "VLLM_FL_HFTOKEN": "secret",
    "FLAGCX_PASSWD1": "secret",
    "FLAGGEMS_PRIVATEKEY": "secret",
    "FLAGGEMS_cookie": "secret",
    "FLAGGEMS_HEADER_BEARER": "secret",
    "FLAGGEMS_DSN": "me:secret@host:5432/tuning",
    "FLAGGEMS_CONNECTION": "host=host user=me password=secret",
    "FLAGGEMS_BUCKET": "https://host/tuning?X-Amz-Signature=secret&sig=secret",
}


def test_secrets_reach_no_other_process_and_are_not_shown(capsys, monkeypatch):
    assert forwarded(SECRETS) == {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}
    assert kept_back(SECRETS) == dict.fromkeys(SECRETS, "it holds a password, a token or a key")
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
        assert "secret" not in shown(name, text)
    for form in ("--json", "--sh"):
        main(["env", form])
        assert "secret" not in capsys.readouterr().out
    assert shown("FLAGGEMS_OTHER_URL", SECRETS["FLAGGEMS_OTHER_URL"]).endswith("?user=me&password=***&ssl=1")


def test_what_a_list_calls_a_token_is_no_secret():
    per_op = "per_token_quant=vendor:cuda|flagos;pass=flagos"
    assert forwarded({"VLLM_FL_PER_OP": per_op})["VLLM_FL_PER_OP"] == shown("VLLM_FL_PER_OP", per_op) == per_op


@pytest.mark.parametrize(
    "name", ["FLAGCX_IB_PKEY", "VLLM_FL_MAX_TOKENS", "FLAGGEMS_TOKENIZER", "FLAGGEMS_DESIGN", "FLAGGEMS_DB_URL"]
)
def test_what_only_looks_like_a_secret_is_given_on(name):
    assert forwarded({name: "sqlite:///tuning.db"})[name] == "sqlite:///tuning.db"


def test_only_the_stacks_variables_reach_another_process():
    environment = {
        "HOME": "/root",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "WANDB_API_KEY": "secret",
        "USE_FLAGCX": "1",
        "FLAGCX_TUNE_FILE": "/tuned.json",
        "FLAGCX_HOSTID": "node-0",
        "FLAGCX_COMM_ID": "10.0.0.1:5555",
        "GEMS_BACKEND": "metax",
        "VERL_USE_EXTERNAL_MODULES": "mine",
    }
    assert forwarded(environment) == {
        "USE_FLAGCX": "1",
        "FLAGCX_TUNE_FILE": "/tuned.json",
        "GEMS_BACKEND": "metax",
        "VERL_USE_EXTERNAL_MODULES": "mine,verl_fl_overlay",
    }
    assert kept_back(environment) == dict.fromkeys(("FLAGCX_HOSTID", "FLAGCX_COMM_ID"), "it differs between processes")


def test_exports_give_a_shell_the_same_values(tmp_path):
    environment = {"VLLM_FL_PER_OP": "mm=vendor:cuda|flagos", "TE_FL_PREFER": "it's $HOME", "FLAGCX_TUNE_FILE": "x"}
    names = ("VLLM_FL_PER_OP", "TE_FL_PREFER", "VERL_USE_EXTERNAL_MODULES", "FLAGCX_TUNE_FILE")
    script = as_exports(environment) + '\nprintf "%s\\n" ' + " ".join(f'"${name}"' for name in names)
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    assert shell.stdout.splitlines() == ["mm=vendor:cuda|flagos", "it's $HOME", "verl_fl_overlay", "x"]
    assert "VLLM_FL_PER_OP" not in as_exports(environment, "training")


def test_a_password_is_not_shown():
    text = json.dumps(examine({"FLAGGEMS_DB_URL": "postgresql://user:secret@host/tuning"}))
    assert "secret" not in text
    assert "postgresql://***@host/tuning" in text


def test_the_command_tells_value_source_effect_and_faults(monkeypatch, capsys):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USE_FLAGCX", "maybe")
    assert main(["env", "--json", "--phase", "training"]) == 1
    result = json.loads(capsys.readouterr().out)
    row = next(row for row in result["variables"] if row["name"] == "USE_FLAGCX")
    assert row["value"] == "maybe"
    assert row["source"] == "environment"
    assert row["effect"]
    assert result["errors"] == ["USE_FLAGCX='maybe': allowed is one of 1, true, yes, on, 0, false, no, off"]
    assert "VLLM_FL_PREFER" not in {row["name"] for row in result["variables"]}
    monkeypatch.setenv("USE_FLAGCX", "0")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "no conflicts" in text
    assert "USE_FLAGCX=0" in text.split("not set:")[0]


def test_the_json_is_written_to_any_output():
    env = {"PYTHONIOENCODING": "ascii", "VLLM_FL_CONFIG": "/\u00e4.yaml"}
    done = run("-m", "verl_fl_overlay", "env", "--json", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    (told,) = json.loads(done.stdout)["warnings"]
    assert told.startswith("VLLM_FL_CONFIG='/\u00e4.yaml' is no file on this machine")


def test_the_command_needs_neither_torch_nor_verl():
    code = "import sys; from verl_fl_overlay.cli import main; main(['env']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd="/")


GEMS = """
_FULL_CONFIG = (
    ("add.Tensor", add),
    (
        "_to_copy",
        to_copy,
        lambda: version.parse(torch.__version__) >= version.parse("2.4"),
    ),
    ("_softmax", softmax),
)
"""


@pytest.fixture
def flaggems(tmp_path, monkeypatch):
    """Install a FlagGems of three operators that cannot be imported, and a verl."""
    for folder, text in (("flag_gems", GEMS), ("verl/version", "")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text(text)
    (tmp_path / "flag_gems-5.0.0.dist-info").mkdir()
    (tmp_path / "flag_gems-5.0.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: flag-gems\nVersion: 5.0.0\n"
    )
    (tmp_path / "verl/__init__.py").write_text("raise RuntimeError('env imports nothing')")
    (tmp_path / "verl/version/version").write_text("0.9.1")
    return tmp_path


def judged(site, environment):
    done = run("-m", "verl_fl_overlay", "env", "--json", env={"PYTHONPATH": f"{site}:{ROOT}", **environment})
    result = json.loads(done.stdout)
    assert done.returncode == (1 if result["errors"] else 0)
    assert not [text for text in result["errors"] + result["warnings"] if "\n" in text]
    return result["errors"], result["warnings"]


def test_names_of_operators_are_checked_without_importing_flaggems(flaggems):
    good = {"VERL_FL_OPS": "add,to_copy", "VERL_FL_UNSAFE_OPS": "aten::_softmax", "USE_FLAGGEMS": "1"}
    assert judged(flaggems, good) == ([], [])
    for names in ("auto", "all", "none"):
        assert judged(flaggems, {"VERL_FL_OPS": names, "USE_FLAGGEMS": "1"}) == ([], [])
    (told,), _ = judged(flaggems, {"VERL_FL_OPS": "add,softmex", "USE_FLAGGEMS": "1"})
    assert told.startswith(
        "VERL_FL_OPS names operators that FlagGems 5.0.0 does not offer here; 'softmex': did you mean"
    )
    (told,), _ = judged(flaggems, {"VERL_FL_UNSAFE_OPS": "add", "USE_FLAGGEMS": "1"})
    assert "'add': it is a function; its aten keys are add.Tensor" in told
    (told,), _ = judged(flaggems, {"TRAINING_FL_FLAGOS_WHITELIST": "bogus", "USE_FLAGGEMS": "1"})
    assert told.startswith("TRAINING_FL_FLAGOS_WHITELIST names operators that FlagGems 5.0.0")
    errors, (told,) = judged(flaggems, {"TRAINING_FL_FLAGOS_BLACKLIST": "bogus", "USE_FLAGGEMS": "1"})
    assert errors == []
    assert told.startswith("TRAINING_FL_FLAGOS_BLACKLIST excludes nothing by 'bogus'")


def test_a_list_that_nobody_reads_or_that_cannot_be_checked_is_a_warning(flaggems):
    errors, (told,) = judged(flaggems, {"VERL_FL_OPS": "bogus"})
    assert (errors, "'bogus'" in told) == ([], True)
    (flaggems / "flag_gems/__init__.py").write_text("")
    errors, (told,) = judged(flaggems, {"VERL_FL_OPS": "bogus", "USE_FLAGGEMS": "1"})
    assert errors == []
    assert told.startswith("VERL_FL_OPS: FlagGems has no table of operators that can be read, so the names cannot")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"VERL_FL_DISABLE": "engine.nw"},
            "VERL_FL_DISABLE: verl 0.9.1 has no hook 'engine.nw': did you mean engine.new",
        ),
        (
            {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay,nowhere.at_all"},
            "VERL_USE_EXTERNAL_MODULES names nowhere.at_all, which is not installed here",
        ),
        (
            {"VERL_FL_PROFILE": "/none.json", "USE_FLAGGEMS": "1"},
            "VERL_FL_PROFILE: the profile /none.json cannot be read",
        ),
    ],
)
def test_what_training_would_refuse_is_an_error(flaggems, environment, said):
    (told,), _ = judged(flaggems, environment)
    assert told.startswith(said)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"VERL_PLATFORM": "nvidai"}, "VERL_PLATFORM=nvidai is no chip that is known here; nvidia?"),
        ({"GEMS_VENDOR": "ascent"}, "GEMS_VENDOR=ascent is no vendor that is known here; ascend?"),
        (
            {"VERL_FL_REPORT_DIR": "/dev/null/x"},
            "VERL_FL_REPORT_DIR=/dev/null/x cannot be written: /dev/null is a file",
        ),
        ({"VERL_FL_REPORT_DIR": "reports"}, "VERL_FL_REPORT_DIR='reports' is a relative path"),
        ({"VERL_FL_PROFILE": "x.json"}, "VERL_FL_PROFILE='x.json' is a relative path"),
    ],
)
def test_what_training_would_only_warn_about_is_a_warning(flaggems, environment, said):
    errors, warnings = judged(flaggems, environment)
    assert errors == []
    assert [text for text in warnings if text.startswith(said)]


def test_a_profile_of_other_versions_is_told(flaggems):
    made = {"chip": "x", "torch": "2.0", "triton": "3.0", "flag_gems": "4.9"}
    text = json.dumps({"format": 1, "key": made, "workload": "w", "measurements": [], "chosen": [], "step_ms": {}})
    (flaggems / "p.json").write_text(text)
    errors, _ = judged(flaggems, {"VERL_FL_PROFILE": str(flaggems / "p.json"), "USE_FLAGGEMS": "1"})
    assert [error for error in errors if "was measured with flag-gems 4.9, and 5.0.0 is here" in error]


def test_hooks_of_any_release_are_known_where_there_is_no_verl(monkeypatch):
    monkeypatch.setattr(compat, "find_verl", lambda: None)
    names = [hook.name for hook in compat.select(compat.InstalledVerl("0.7.0", "")).hooks]
    assert examine({"VERL_FL_DISABLE": ",".join(names)})["errors"] == []
    (told,) = examine({"VERL_FL_DISABLE": "engine.nw"})["errors"]
    assert told.startswith("VERL_FL_DISABLE: verl-fl-overlay has no hook 'engine.nw'")


def test_a_terminal_is_told_how_exports_reach_another_shell(monkeypatch, capsys):
    assert main(["env", "--sh"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for form in ([], ["--sh"]):
        assert main(["env", *form]) == 0
        captured = capsys.readouterr()
        assert "verl-fl env --sh > fl.env" in captured.err
    assert captured.out.count("\n") == 1
