"""verl's main_ppo loses a process or its disk in mid-training: it ends or goes on as it does without the overlay.

"without" is the least of the overlay that verl needs on a CPU: the hooks on devices, processes and Ray's resources.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time

import pytest
from on_ray import ppo
from on_ray.test_grpo import missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all there")

SIDES = ["with", "without"]
PADDED = (
    "actor_rollout_ref.model.use_remove_padding=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
)
SAVING = ("trainer.save_freq=1", "trainer.resume_mode=auto")
UPDATE = "ray::WorkerDict.actor_rollout_update_actor"
SECONDS = 180
"""Ray tells the driver of a dead actor in seconds; a run that has not ended by then hangs."""

RAYLET_GONE = ("ActorUnavailableError", "ActorDiedError", "RaySystemError", "NodeDiedError", "WorkerCrashedError")
"""Ray names one of them, whichever of its connections breaks first."""

ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception))\b", re.MULTILINE)


def least() -> str:
    """Return what VERL_FL_DISABLE has to name for the least of the overlay that verl needs on a CPU."""
    from verl_fl_overlay import compat

    found = compat.find_verl()
    assert found is not None
    return ",".join(h.name for h in compat.select(found).hooks if h.feature not in ("cpu", "chip", "ray"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, ppo.ARITHMETIC, folder], check=True, capture_output=True)
    return folder


def start(side, data, folder, steps, *more, **environment):
    """Start a training of ``steps`` steps in ``folder``."""
    for name in ("model", "problems.parquet"):
        if not (folder / name).exists():
            (folder / name).symlink_to(data / name)
    bare = {"VERL_FL_DISABLE": least()} if side == "without" else {}
    settings = (*more, *(PADDED if side == "without" else ()))
    return ppo.training(folder, steps, *settings, environment={**bare, **environment})


@contextlib.contextmanager
def disk(folder, kilobytes):
    """Mount a disk of this size; yield whether that was possible, else the folder is an ordinary one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=False)


def fill(folder):
    """Write into the disk of ``folder`` until it is full."""
    with open(folder / "other data", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def ended(run, seconds=SECONDS):
    """Wait for the end; return exit status (None: it hung), seconds until then and the errors the driver printed."""
    begun = time.monotonic()
    status = run.wait(seconds)
    own = "".join(line for line in run.lines if "pid=" not in line[:60])
    told = {"status": status, "seconds": round(time.monotonic() - begun), "errors": ERROR.findall(own)}
    return {**told, "steps": sorted(run.metrics), "lines": run.lines, "log": run.log()}


def reports(folder):
    """Return the reports in a folder; fail if one is not whole, or if there is anything else."""
    assert [file.name for file in folder.iterdir() if file.suffix != ".json"] == []
    return [json.loads(file.read_text()) for file in folder.glob("*.json")]


def newest(folder):
    """Return the step of the checkpoint that verl would resume from."""
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


def digests(checkpoint):
    """Return a hash of each of its files; fail if one with weights is not whole."""
    import torch

    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    weights = [torch.load(file, weights_only=False) for file in files if file.suffix == ".pt"]
    assert len(weights) >= 2 * 2, "model and optimizer of two ranks"
    return {str(file.relative_to(checkpoint)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module", params=SIDES)
def story(request, data, tmp_path_factory):
    """A worker is killed in an update while there is no room for reports; the next run finds no room to save."""
    side, folder = request.param, tmp_path_factory.mktemp(request.param)
    checkpoints = folder / "checkpoints"
    with disk(folder / "full", 64) as full, disk(checkpoints, 12000) as small:
        with start(side, data, folder, 20, *SAVING, VERL_FL_REPORT_DIR=str(folder / "full")) as run:
            run.wait_for_step(2)
            run.process(UPDATE).kill()
            killed = ended(run)
        told = {"full": full, "small": small, "killed": killed, "reports": reports(folder / "full")}
        told["last"] = last = newest(checkpoints)
        told["before"] = digests(checkpoints / f"global_step_{last}")
        if small:
            fill(checkpoints)
        with start(side, data, folder, last + 2, *SAVING) as run:
            if not small:
                run.wait_for_step(last + 2)
            told["resumed"] = ended(run, ppo.START + SECONDS)
        told["after"] = digests(checkpoints / f"global_step_{last}")
        told["newest"] = newest(checkpoints)
        yield told


def test_a_worker_killed_in_an_update_ends_the_run_with_rays_error(story):
    killed = story["killed"]
    assert killed["status"], killed["log"]
    assert killed["errors"][-1] == "ActorDiedError", killed["log"]


def test_no_room_for_reports_is_a_warning_a_process(story):
    if not story["full"]:
        pytest.skip("needs root, to mount a disk that fills up")
    warned = [line for line in story["killed"]["lines"] if "training goes on without it" in line]
    processes = [match[1] for line in warned if (match := re.search(r"pid=(\d+)", line))]
    assert len(processes) >= 2
    assert len(processes) == len(set(processes)), warned
    assert story["reports"], "those that found room"


def test_training_goes_on_from_the_checkpoint(story):
    last, resumed = story["last"], story["resumed"]
    assert last >= 2
    assert resumed["steps"][:1] == [last + 1] or story["small"], resumed["log"]
    assert any(f"global_step_{last}" in line and "esum" in line for line in resumed["lines"]), resumed["log"]


def test_no_room_for_a_checkpoint_ends_the_run_and_the_last_one_stays(story):
    if not story["small"]:
        pytest.skip("needs root, to mount a disk that fills up")
    resumed = story["resumed"]
    assert resumed["status"], resumed["log"]
    assert story["newest"] == story["last"]
    assert story["after"] == story["before"]
    assert resumed["errors"][-1] in ("RuntimeError", "OSError"), "torch's or the file's"
    assert any("save_checkpoint" in line for line in resumed["lines"]), resumed["log"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("process", "steps", "error"), [("ray::Server", 6, ["ActorDiedError"]), ("raylet", 9, RAYLET_GONE)]
)
def test_a_rollout_server_or_a_raylet_killed_ends_the_run_with_rays_error(process, steps, error, side, data, tmp_path):
    with start(side, data, tmp_path, steps) as run:
        run.wait_for_step(2)
        run.process(process).kill()
        told = ended(run)
    assert told["status"], told["log"]
    assert told["errors"][-1] in error, told["log"]
    assert reports(tmp_path / "reports")


@pytest.mark.parametrize("side", SIDES)
def test_a_reward_that_raises_ends_the_run_with_verls_error(side, data, tmp_path):
    """verl counts its group as failed, logs what the user's function raised, and has nothing to train on."""
    (tmp_path / "broken.py").write_text("def reward(*given, **more):\n    raise ValueError('by the user')\n")
    own = f"reward.custom_reward_function.path={tmp_path}/broken.py"
    with start(side, data, tmp_path, 2, own) as run:
        told = ended(run, ppo.START + SECONDS)
    assert told["status"], told["log"]
    assert told["errors"][-1] == "RuntimeError", told["log"]
    assert any("ValueError: by the user" in line for line in told["lines"]), told["log"]
    assert not any("verl_fl_overlay" in line and "File" in line for line in told["lines"]), told["log"]
