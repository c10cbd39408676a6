"""vLLM with the real vllm-plugin-FL: its answers are vLLM's own, and the chip's blacklist is kept beside the user's.

Needs a vLLM that fits the plugin: vLLM 0.24.0 for its branch v0.3.0-dev.  ``pytest -s`` shows how far a program is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from processes import PLAIN, clean_environment

from verl_fl_overlay.packages import folders, installed

torch = pytest.importorskip("torch", reason="needs torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("runs"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *(
        pytest.mark.skipif(not installed(package), reason=f"needs {package}")
        for package in ("verl", "vllm", "vllm_fl", "flag_gems", "yaml")
    ),
]

ROOT = Path(__file__).resolve().parents[2]
ROLLOUT = "actor_rollout_ref.rollout"
PROGRAM = Path(__file__).with_name("plugin_generation.py")
MINE = ["mm", "addmm", "linear", "bmm"]
"""The user's list.  FlagGems would measure some hundred tile sizes for these in every shape, which takes minutes."""
PLUGIN = {
    "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
    "VLLM_PLUGINS": "fl",
    "VLLM_FL_FLAGOS_BLACKLIST": ",".join(MINE),
}


def program(*command: str | Path, seconds: int, **environment: str) -> str:
    """Return what a program prints; fail the test if it fails.  What it says meanwhile is shown."""
    done = subprocess.run(
        [*map(str, command)],
        env={**clean_environment(environment), "PYTHONUNBUFFERED": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=seconds,
        check=False,
    )
    print(done.stdout, file=sys.stderr)
    assert done.returncode == 0, f"exit status {done.returncode}"
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that adds digits."""
    folder = tmp_path_factory.mktemp("model")
    program(sys.executable, PROGRAM, folder, seconds=200, **PLAIN)
    return folder


@pytest.fixture(scope="module")
def sides(model: Path) -> dict[str, dict[str, Any]]:
    """Return what vLLM answers by itself, and what it answers with the plugin; ``record`` is the plugin's record."""
    record = model / "operators.txt"
    on = {**PLUGIN, "USE_FLAGGEMS": "1", "FLAGGEMS_ENABLE_OPLIST_PATH": str(record)}
    found = {}
    for side, environment in {"vLLM": {**PLAIN, "VLLM_PLUGINS": "none"}, "plugin": on}.items():
        printed = program(sys.executable, PROGRAM, model, "--generate", seconds=280, **environment)
        (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
        found[side] = json.loads(line.removeprefix("RESULT "))
    return {**found, "plugin": {**found["plugin"], "record": recorded(record)}}


def recorded(file: Path) -> set[str]:
    """Return the FlagGems functions that the plugin saw run: its lines are ``[DEBUG] module.function: message``."""
    return set(re.findall(r"^\[DEBUG\] flag_gems\S*\.(\w+):", file.read_text(), re.MULTILINE))


def chips_own() -> list[str]:
    """Return the list that the plugin has for this chip."""
    import yaml

    (folder,) = folders("vllm_fl")
    return list(yaml.safe_load(Path(folder, "dispatch/config/nvidia.yaml").read_text())["flagos_blacklist"])


def test_answers_are_vllms_own(sides, record_property):
    own, plugin = sides["vLLM"], sides["plugin"]
    assert mean(text == str(i // 10 + i % 10) for i, text in enumerate(own["texts"])) > 0.98, "the model can add"
    same = mean(a == b for a, b in zip(own["tokens"], plugin["tokens"], strict=True))
    record_property("answers alike", same)
    assert same > 0.98
    differences = [
        abs(a - b)
        for ours, theirs in zip(plugin["logprobs"], own["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=False)
    ]
    record_property("mean difference of log-probs", mean(differences))
    assert mean(differences) < 0.02


def test_the_model_computes_with_the_plugins_layers(sides, record_property):
    assert not [layer for layer in sides["vLLM"]["layers"] if layer.startswith("vllm_fl.")]
    assert {"vllm_fl.RMSNormFL", "vllm_fl.SiluAndMulFL", "vllm_fl.RotaryEmbeddingFL"} <= {*sides["plugin"]["layers"]}
    record_property("FlagGems functions that ran", sorted(sides["plugin"]["record"]))
    assert len(sides["plugin"]["record"]) > 5


def test_the_chips_blacklist_is_kept_and_extended(sides):
    """In the engine's process, which has no overlay: it inherits what the overlay wrote where it was started."""
    plugin, own = sides["plugin"], chips_own()
    assert not plugin["overlay"]
    assert plugin["whitelist"] is None
    assert plugin["blacklist"] == [*MINE, *own]
    assert len(plugin["registered"]) > 100
    assert not {*MINE, *own} & {*plugin["registered"]}, "none of them replaces torch's operator"
    assert not {*MINE, *own} & plugin["record"], "none of them ran"


def test_grpo(model, tmp_path, record_property):
    """verl's own main_ppo: generation by the plugin, the actor's log-probs by torch and the overlay.

    The plugin's worker cannot give its memory back (no ``sleep``), so verl must not ask for that.
    """
    import recipe
    from arithmetic import write_problems

    problems, record = tmp_path / "problems.parquet", tmp_path / "operators.txt"
    write_problems(problems, count=64, seed=1)
    sizes = {"BATCH": 16, "ANSWERS": 4, "PROMPT": 64, "RESPONSE": 8, "SAVE": -1, "VLLM_MEMORY": 0.3}
    places = {"MODEL": model, "DATA": problems, "REWARD": ROOT / "examples" / "arithmetic.py", "OUT": tmp_path}
    log = program(
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *recipe.overrides(**sizes, **places),
        f"+{ROLLOUT}.enable_sleep_mode=False",
        f"{ROLLOUT}.free_cache_engine=False",
        f"{ROLLOUT}.enforce_eager=True",
        f"{ROLLOUT}.max_num_seqs=16",
        f"{ROLLOUT}.max_num_batched_tokens=512",
        f"{ROLLOUT}.agent.num_workers=1",
        "reward.num_workers=1",
        "data.dataloader_num_workers=0",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "trainer.total_training_steps=2",
        seconds=500,
        **PLUGIN,
        FLAGGEMS_ENABLE_OPLIST_PATH=str(record),
    )
    assert re.findall(r"step:(\d+) - ", log)[-1] == "2", "both steps are done"
    assert f"VLLM_FL_FLAGOS_BLACKLIST: added {', '.join(chips_own())}" in log
    differences = [float(d) for d in re.findall(r"rollout_probs_diff_mean:(?:np\.float\w+\()?([-+.\deE]+)", log)]
    record_property("rollout against actor: mean differences of probabilities", differences)
    assert len(differences) == 2
    assert max(differences) < 0.02
    ran = recorded(record)
    record_property("FlagGems functions that ran in rollout", sorted(ran))
    assert len(ran) > 5
    assert not {*MINE, *chips_own()} & ran
