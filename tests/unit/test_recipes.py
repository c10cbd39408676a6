"""The recipes as shell scripts: what they run, and what they say before minutes are spent on a start that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe
from recipes import RECIPES, Place

SCRIPTS = ("grpo_vllm.sh", "megatron.sh", "sft.sh")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_the_command_that_pages_show_is_what_the_recipe_runs(place):
    assert place.bash("-c", recipe.command()).returncode == 0
    shown = place.asked()
    done = place.bash(RECIPES / "grpo_vllm.sh")
    assert done.returncode == 0, done.stderr
    assert place.asked() == shown
    assert len(shown) > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_paths_are_made_absolute_and_what_the_user_adds_comes_last(place, script):
    (place.folder / "own").mkdir()
    (place.folder / "own" / "config.json").touch()
    done = place.bash(RECIPES / script, "trainer.total_epochs=7", "+a.b='c d'", MODEL="own", OUT="there", GPUS="4")
    assert done.returncode == 0, done.stderr
    module, reports, *arguments = place.asked()
    assert (module, reports) == ("verl_fl_overlay", str(place.folder / "there" / "reports"))
    assert arguments[-2:] == ["trainer.total_epochs=7", "+a.b='c d'"]
    assert any(argument.endswith(f"model.path={place.folder / 'own'}") for argument in arguments)
    paths = [argument.partition("=")[2] for argument in arguments if "/" in argument]
    assert all(Path(path).is_absolute() for path in paths)
    assert "log: " in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failed_run_leaves_no_report_of_an_earlier_one_and_names_its_log(place, script):
    old = place.folder / "there" / "reports" / "old.json"
    old.parent.mkdir(parents=True)
    old.touch()
    done = place.bash(RECIPES / script, OUT="there", TRAINING="3")
    assert done.returncode == 2
    name = script.replace("megatron", "grpo_vllm")  # which trains for it
    assert done.stderr == f"{name}: training failed with exit status 3; its log: {place.folder}/there/train.log\n"
    assert not old.exists()


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        *((script, {"MODEL": "none"}, "none has no config.json") for script in SCRIPTS),
        *((script, {"DATA": "none"}, "none is no file") for script in SCRIPTS),
        *((script, {"MISSING": "vllm"}, "cannot import: vllm") for script in SCRIPTS),
        *((script, {"OUT": "examples/arithmetic.py"}, "cannot be written") for script in SCRIPTS),
        *((script, {"DOCTOR": "1"}, "the overlay would not train here") for script in SCRIPTS),
        ("grpo_vllm.sh", {"REWARD": "none.py"}, "none.py is no file"),
        ("megatron.sh", {"GPUS": "3"}, "NODES=1 times GPUS=3 is no multiple of TP=2 times PP=1"),
    ],
)
def test_what_is_wrong_is_one_line(place, script, variables, said):
    done = place.bash(RECIPES / script, **variables)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.split(": ")[0] in SCRIPTS
    assert said in line
    assert not (place.folder / "asked").exists()


def test_without_python_it_says_so(place):
    (place.folder / "bin" / "python").unlink()
    done = place.bash(RECIPES / "sft.sh", PATH=tools(place.folder))
    assert done.returncode == 2
    assert "activate the environment" in done.stderr


def tools(folder: Path) -> str:
    """Return a folder with what the recipes use of the system, and no python."""
    for name in ("realpath", "dirname"):
        (folder / "tools").mkdir(exist_ok=True)
        (folder / "tools" / name).symlink_to(f"/usr/bin/{name}")
    return str(folder / "tools")
