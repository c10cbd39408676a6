"""``verl-fl config``: what it prints for chips, releases and models, and that a shell can run it."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.cli import config, main, model_folder
from verl_fl_overlay.devices import chips
from verl_fl_overlay.settings import TABLE

MODEL = {"model_type": "x", "architectures": ["X"], "max_position_embeddings": 32768, "vocab_size": 100}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(model_folder, "source", lambda path: None)
    monkeypatch.setattr(config, "installed", lambda package: False)


@pytest.fixture
def model(tmp_path):
    """Return a function that writes a model's folder."""

    def write(tokens=100, **changes):
        folder = tmp_path / "a model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**MODEL, **changes}))
        (folder / "model.safetensors").write_text("w")
        words = {f"t{number}": number for number in range(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
        return folder

    return write


def told(capsys, *arguments):
    assert main(["config", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def exports(found):
    return {export["name"]: export["value"] for export in found["exports"]}


def overrides(found):
    return {override["key"]: override["value"] for override in found["overrides"]}


NVIDIA = ("--verl", "0.9.1", "--chip", "nvidia")


def test_few_lines_are_needed_on_a_chip_that_verl_knows(capsys):
    found = told(capsys, *NVIDIA)
    assert exports(found) == {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}
    assert overrides(found) == {
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.rollout.n": "8",
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.actor.use_dynamic_bsz": "True",
        "trainer.logger": "[console]",
    }
    assert all(entry["why"] for entry in found["exports"] + found["overrides"])


@pytest.mark.parametrize("vendor", [*chips.CHIPS, "cpu"])
def test_every_chip_has_its_exports(vendor, capsys):
    found = exports(told(capsys, "--verl", "0.9.1", "--chip", vendor))
    chip = chips.CHIPS.get(vendor, chips.CPU)
    assert found.get("VERL_PLATFORM") == (None if vendor in ("nvidia", "amd", "ascend", "cpu") else vendor)
    assert found.get("VERL_FL_DEVICE") == ("cpu" if vendor == "cpu" else None)
    assert found.get("VLLM_PLUGINS") == (None if vendor in ("nvidia", "amd", "ascend", "cpu") else "fl")
    assert found.get("USE_FLAGCX") == (None if chip.backend else "1")
    assert {*found} <= {*TABLE}, "an export that nobody reads"


@pytest.mark.parametrize(
    ("chip", "rollout", "awake"), [("metax", "vllm", 2), ("metax", "sglang", 0), ("nvidia", "vllm", 0)]
)
def test_vllms_plugin_is_not_told_to_sleep(chip, rollout, awake, capsys):
    """Its worker has no ``sleep``, and vLLM refuses to start with sleep mode on its platform."""
    found = overrides(told(capsys, "--verl", "0.9.1", "--chip", chip, "--rollout", rollout))
    keys = ("+actor_rollout_ref.rollout.enable_sleep_mode", "actor_rollout_ref.rollout.free_cache_engine")
    assert [found[key] for key in keys if key in found] == ["False"] * awake


def test_what_is_set_is_kept(monkeypatch, capsys):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine")
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    found = exports(told(capsys, "--verl", "0.9.1", "--chip", "metax", "--rollout", "sglang"))
    assert found["VERL_USE_EXTERNAL_MODULES"] == "mine,verl_fl_overlay"
    assert found["SGLANG_PLUGINS"] == "other,sglang_fl"


def test_the_release_that_is_installed_and_the_chip_that_is_here_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(compat, "find_verl", lambda: compat.InstalledVerl("0.8.0", ""))
    monkeypatch.setenv("GEMS_VENDOR", "hygon")
    found = told(capsys)
    assert (found["verl"], found["chip"]) == ("0.8.0", {"vendor": "hygon", "told by": "GEMS_VENDOR=hygon"})


def test_what_earlier_releases_lack(capsys):
    found = told(capsys, "--verl", "0.7.1", "--chip", "nvidia", "--task", "ppo")
    assert overrides(found)["critic.model.use_remove_padding"] == "True"
    assert found["notes"] == [
        "not needed: attn_implementation, use_fused_kernels; verl's defaults run with the overlay"
    ]
    sft = overrides(told(capsys, "--verl", "0.7.0", "--chip", "mthreads", "--task", "sft"))
    assert sft["trainer.device"] == "musa"
    assert "trainer.device" not in overrides(told(capsys, "--verl", "0.8.0", "--chip", "mthreads", "--task", "sft"))


def test_a_newer_release_is_not_called_tested(capsys):
    assert told(capsys, "--verl", "0.11.0", "--chip", "nvidia")["notes"][0].startswith("verl 0.11.0 was not tested")


def test_a_model_s_folder_is_absolute_and_its_limits_are_kept(model, capsys, monkeypatch):
    folder = model(tokens=90)
    monkeypatch.chdir(folder.parent)
    found = told(capsys, folder.name, *NVIDIA, "--task", "ppo", "--prompt", "30000", "--response", "2000")
    said = overrides(found)
    assert said["actor_rollout_ref.model.path"] == said["critic.model.path"] == f"'{folder}'"  # a space in it
    assert (said["data.max_prompt_length"], said["data.max_response_length"]) == ("30000", "2000")
    assert said["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == "32000"
    assert "critic.ppo_max_token_len_per_gpu" not in said
    assert [note for note in found["notes"] if note.startswith("the tokenizer has 90 tokens, the model 100")]


def test_a_folder_that_no_override_can_name_is_refused(model, capsys):
    written = model()
    renamed = written.rename(os.fsdecode(bytes(written) + b"-\xe6"))
    assert main(["config", str(renamed), *NVIDIA]) == 2
    assert "is no UTF-8" in capsys.readouterr().err


def test_that_no_rollout_was_run_on_a_cpu_is_said(capsys):
    told_on = {
        task: told(capsys, "--verl", "0.9.1", "--chip", "cpu", "--task", task)["notes"] for task in ("grpo", "sft")
    }
    assert [note for note in told_on["grpo"] if "rollout on a CPU was not run" in note]
    assert not [note for note in told_on["sft"] if "rollout" in note]


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"conv_L_cache": 3},
        {"text_config": {"mamba_d_state": 8}},
    ],
)
def test_a_model_with_layers_that_mix_packed_sequences_is_padded(model, changes, capsys, monkeypatch):
    folder = model(**changes)
    assert overrides(told(capsys, folder, *NVIDIA))["actor_rollout_ref.model.use_remove_padding"] == "False"
    said = overrides(told(capsys, folder, *NVIDIA, "--task", "ppo"))
    assert said["critic.model.use_remove_padding"] == "False"
    monkeypatch.setattr(config, "installed", lambda package: True)
    assert "actor_rollout_ref.model.use_remove_padding" not in overrides(told(capsys, folder, *NVIDIA))


def test_a_model_of_attention_alone_is_packed(model, capsys):
    folder = model(layer_types=["full_attention", "sliding_attention"], mamba_d_state=8)
    assert "actor_rollout_ref.model.use_remove_padding" not in overrides(told(capsys, folder, *NVIDIA))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--verl", "0.6.1"), "verl 0.6.1 is older than 0.7.0"),
        (("--verl", "newest"), "--verl newest: needed is a version, such as "),
        (("--chip", "nvidai"), "--chip nvidai is not known; nvidia?; allowed are ascend, "),
        (("--prompt", "0"), "--prompt 0: allowed is 1 or more"),
        (("--verl", "0.8.0", "--chip", "mthreads"), "--task sft, or verl >= 0.9.0"),
        (("MODEL", "--response", "40000"), "40512 tokens of prompt and response are more than the 32768 positions"),
        (("/nowhere/model",), "there is no folder /nowhere/model"),
        (("",), "there is no folder ''"),  # a variable of a shell that is not set
    ],
)
def test_what_cannot_be_is_told_in_a_line(arguments, said, model, capsys):
    given = [str(model()) if argument == "MODEL" else argument for argument in arguments]
    assert main(["config", *NVIDIA, *given]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_without_verl_or_a_chip_the_option_is_told(monkeypatch, capsys):
    monkeypatch.setattr(compat, "find_verl", lambda: None)
    assert main(["config", "--chip", "nvidia"]) == 2
    assert "name a release: --verl 0." in capsys.readouterr().err
    monkeypatch.setattr(chips, "find", lambda: (None, "nothing is there"))
    assert main(["config", "--verl", "0.9.1"]) == 2
    assert "name one: --chip nvidia, or --chip cpu" in capsys.readouterr().err


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(model, capsys):
    assert main(["config", str(model(tokens=101)), *NVIDIA]) == 2
    assert "a tokenizer with 101 tokens and a model with a vocabulary of 100" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["100", None, -1, 1e400, [1]])
def test_a_size_that_is_no_number_is_no_size(size, model, capsys):
    assert not any("tokenizer" in note for note in told(capsys, model(vocab_size=size), *NVIDIA)["notes"])


@pytest.mark.parametrize("ids", ['{"a": 1e400}', '{"a": "x"}', "[" * 100_000])
def test_a_tokenizer_that_cannot_be_read_tells_no_size(ids, model, capsys):
    folder = model()
    (folder / "tokenizer.json").write_text(f'{{"model": {{"vocab": {ids}}}}}')
    assert not any("tokenizer" in note for note in told(capsys, folder, *NVIDIA)["notes"])


@pytest.mark.parametrize("task", ["grpo", "sft"])
def test_a_shell_runs_what_is_printed(task, model, capsys, tmp_path):
    arguments = [str(model()), *NVIDIA, "--task", task, "--engine", "fsdp2"]
    found = told(capsys, *arguments)
    assert main(["config", *arguments]) == 0
    script = capsys.readouterr().out
    program = found["command"].split()[0]
    script = f'{program}() {{ printf "%s\\n" "$VERL_USE_EXTERNAL_MODULES" "$@"; }}\n{script}'
    (tmp_path / "train.sh").write_text(script)
    ran = subprocess.run(
        ["bash", "-eu", tmp_path / "train.sh", "data.train_files=x"], capture_output=True, text=True, check=True
    )
    expected = [f"{override['key']}={override['value']}" for override in found["overrides"]]
    assert ran.stdout.splitlines() == [
        "verl_fl_overlay",
        *found["command"].split()[1:],
        *expected,
        "data.train_files=x",
    ]
