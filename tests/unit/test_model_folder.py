"""What is wrong with a model's folder, or with the batch for it, is told before anything is imported or run."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest
from processes import run

from verl_fl_overlay import compat
from verl_fl_overlay.cli import main, model_folder, trial
from verl_fl_overlay.cli.model_folder import ModelError
from verl_fl_overlay.compat.trial import Trial
from verl_fl_overlay.errors import UnsupportedVerlError
from verl_fl_overlay.settings import Settings

CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 512}
SOURCES = {
    "transformers/models/auto/configuration_auto.py": '("qwen2", "Qwen2Config"),\n("gpt2", "GPT2Config"),',
    "transformers/modeling_utils.py": '_global_mapping = {\n"sdpa": sdpa,\n"flash_attention_2": f,\n"sdpa_paged": x,}',
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Let a transformers that knows two types, and a verl, be installed."""
    monkeypatch.setattr(model_folder, "source", SOURCES.get)
    monkeypatch.setattr(compat, "find_verl", lambda: compat.InstalledVerl("0.9.1", ""))
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Return a folder that looks like a model's."""
    made = tmp_path / "model"
    made.mkdir()
    for name, text in (("config.json", json.dumps(CONFIG)), ("model.safetensors", "w"), ("tokenizer.json", "{}")):
        (made / name).write_text(text)
    return made


def refusal(folder, **batch) -> str:
    with pytest.raises(ModelError) as error:
        model_folder.checked(Trial(str(folder), **batch))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_is_accepted(folder):
    assert model_folder.checked(Trial(str(folder))) == Trial(str(folder))
    assert model_folder.opened(str(folder)).positions == 512


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config.json": None}, "is no model's folder: there is no config.json in it"),
        ({"config.json": None, "actor/config.json": "{}"}, "no config.json in it; actor in it has one"),
        ({"config.json": '{"model_type":'}, "config.json is no JSON: Expecting value"),
        ({"config.json": "[]"}, "config.json holds list, not an object"),
        ({"config.json": "[" * 100_000}, "config.json is no JSON: maximum recursion depth exceeded"),
        ({"config.json": '{"architectures": ["A"]}'}, "has no model_type"),
        (
            {"config.json": '{"model_type": "qwen2"}'},
            "has to name one class in architectures, as verl asks; it has None",
        ),
        ({"config.json": json.dumps({**CONFIG, "model_type": "quen2"})}, "transformers does not know; qwen2?"),
        ({"config.json": json.dumps({**CONFIG, "model_type": "x", "auto_map": {}})}, "model_type 'x'"),
        ({"model.safetensors": None}, "holds no weights: there is none of model.safetensors, "),
        ({"model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git's pointer to the weights"),
        ({"tokenizer.json": None}, "holds no tokenizer"),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": '{"weight_map": {"a": "1.st", "b": "2.st", "c": "3.st"}}',
                "2.st": "w",
            },
            "lacks 1.st and 1 more of the 3 files that model.safetensors.index.json names",
        ),
        ({"model.safetensors": None, "pytorch_model.bin.index.json": "{}"}, "is no index of weights: KeyError"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(folder, changes, said):
    for name, text in changes.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    assert said in refusal(folder)


def test_no_folder_a_file_and_what_cannot_be_read(folder, monkeypatch):
    assert "is a file; needed is the folder of a model" in refusal(folder / "config.json")
    for name in (folder / "none", "~nobody-here/x", ""):
        assert "there is no folder" in refusal(name)
    monkeypatch.setattr("os.listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert refusal(folder).endswith("cannot be read: Permission denied")


def test_a_type_that_another_module_brings_is_not_refused(folder, monkeypatch):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mine"}))
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_fl_overlay")
    assert "does not know" in refusal(folder)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_fl_overlay,my_models")
    model_folder.checked(Trial(str(folder)))


def test_a_hub_id_is_the_folder_in_the_cache_or_told_how_to_download(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert refusal("Qwen/Qwen2.5-0.5B").endswith(
        "download it first: hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B"
    )
    kept = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B"
    (kept / "refs").mkdir(parents=True)
    (kept / "snapshots").mkdir()
    (kept / "refs" / "main").write_text("abc")
    folder.rename(kept / "snapshots" / "abc")
    assert model_folder.checked(Trial("Qwen/Qwen2.5-0.5B")).model == str(kept / "snapshots" / "abc")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"rows": 0}, "--rows 0: allowed is 1 or more"),
        ({"rows": -4}, "--rows -4: allowed is 1 or more"),
        ({"micro_batch": 0}, "--micro-batch 0: allowed is 1 or more"),
        ({"micro_batch": 8}, "--micro-batch 8 does not divide --rows 4"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide --rows 4"),
        ({"length": 1}, "--length 1: allowed is 2 or more"),
        ({"length": 513}, "--length 513 is longer than the 512 positions of "),
        ({"seed": -1}, "--seed -1: allowed is 0 to "),
        ({"seed": 2**64}, f"--seed {2**64}: allowed is 0 to "),
        ({"attention": "spda"}, "no such attention; it has eager, flash_attention_2, sdpa"),
    ],
)
def test_a_batch_that_does_not_fit_is_told(folder, batch, said):
    assert said in refusal(folder, **batch)


def test_positions_of_a_vision_language_model_are_its_text_s(folder):
    inside = {"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 9999}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **inside}))
    assert "longer than the 64 positions" in refusal(folder, length=65)


def test_without_verl_or_with_one_that_is_too_old_a_line_tells_so(folder, monkeypatch):
    for found, said in ((None, "no verl is installed here"), (compat.InstalledVerl("0.6.1", ""), "verl 0.6.1")):
        monkeypatch.setattr(compat, "find_verl", lambda found=found: found)
        with pytest.raises(UnsupportedVerlError, match=said):
            model_folder.checked(Trial(str(folder)))


@pytest.mark.parametrize("command", ["parity", "warmup", "tune"])
def test_a_command_tells_it_at_once_and_imports_nothing_heavy(command, tmp_path):
    begun = time.monotonic()
    program = (
        "import sys; from verl_fl_overlay.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status if not {'torch', 'transformers', 'verl'} & set(sys.modules) else 9)"
    )
    done = run("-c", program, command, tmp_path / "none", env={})
    assert done.returncode == 2
    needed = "needed is the folder of a model, with config.json in it"
    assert done.stderr == f"verl-fl {command}: there is no folder {tmp_path}/none; {needed}\n"
    assert time.monotonic() - begun < 5  # a second alone; other tests run beside


def test_warmup_on_a_cpu_says_that_there_is_nothing_to_warm(folder, monkeypatch, capsys):
    monkeypatch.setenv("VERL_FL_DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["warmup", str(folder), "--length", "64"]) == 0
    assert "nothing to warm: VERL_FL_DEVICE=cpu, and a CPU computes without Triton" in capsys.readouterr().out


def test_a_chip_whose_package_torch_does_not_load_by_itself_is_seen(monkeypatch):
    module = types.SimpleNamespace(is_available=lambda: True)
    torch = types.ModuleType("torch")
    torch.get_device_module = lambda: (_ for _ in ()).throw(AssertionError("the package is not loaded yet"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("importlib.import_module", lambda name: setattr(torch, "musa", module))
    assert trial.has_accelerator(Settings.parse({"VERL_PLATFORM": "mthreads"})[0])
    module.is_available = lambda: False
    assert not trial.has_accelerator(Settings.parse({"VERL_PLATFORM": "mthreads"})[0])


def test_te_fl_takes_no_model(folder, capsys):
    assert main(["parity", "--te-fl", str(folder)]) == 2
    assert "--te-fl compares operators without a model" in capsys.readouterr().err
