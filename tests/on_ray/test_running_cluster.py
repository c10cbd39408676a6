"""The overlay on a Ray cluster that was started beforehand, in a process with an empty environment.

Such a cluster's workers know nothing of the driver's environment: what reaches them was forwarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import vllm_plugin
from real_engine import free_port
from sft import never_called, rank_reports, trainer_arguments, without_images

pytest.importorskip("torch")
pytest.importorskip("ray")
verl = pytest.importorskip("verl")

RANKS = 2
BARE = {"PATH": os.defpath, "RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0", **without_images()}


@pytest.fixture(scope="module")
def cluster():
    """Start Ray with two nodes; give its address.  Only the second one has the resource ``second``."""
    folder = tempfile.mkdtemp(prefix="vflray", dir="/tmp")  # a socket's path may have 107 characters
    port = free_port()
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000"]
    start += ["--node-ip-address=127.0.0.1"]
    # verl before 0.9 asks Ray for a resource of the device's name.
    head = ["--head", f"--port={port}", "--num-cpus=20", '--resources={"cpu": 2}', "--include-dashboard=false"]
    other = [f"--address=127.0.0.1:{port}", "--num-cpus=0", '--resources={"second": 1}']
    with open(Path(folder) / "log", "w") as log, contextlib.ExitStack() as nodes:
        nodes.callback(shutil.rmtree, folder, ignore_errors=True)
        for node in ([*head, f"--temp-dir={folder}"], other):
            started = subprocess.Popen(
                [*start, *node], env={**BARE, "HOME": folder}, stdout=log, stderr=log, cwd=folder
            )
            nodes.callback(end, started)
            wait_for(port)
        yield f"127.0.0.1:{port}"


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_for(port: int) -> None:
    """Wait until Ray listens there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.5)
    raise TimeoutError(f"Ray does not listen at port {port}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make = Path(__file__).resolve().parents[2] / "examples" / "arithmetic.py"
    subprocess.run([sys.executable, make, folder], check=True, capture_output=True)
    return folder


def driver_environment(cluster: str, reports: Path) -> dict[str, str]:
    return {
        **os.environ,
        **without_images(),
        "RAY_ADDRESS": cluster,
        "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay",
        "VERL_FL_DEVICE": "cpu",
        "VERL_FL_REPORT_DIR": str(reports),
        "TEFL_LOG_LEVEL": "WARNING",
        "SGLANG_FL_NEWER": "1",
        "FLAGGEMS_DB_URL": "postgresql://me:secret@host/tuning",
        "FLAGCX_HOSTID": "this node",
        "SOME_API_KEY": "secret",
        "HF_HUB_OFFLINE": "1",
    }


def run_driver(command: list[str], environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def worker_reports(folder: Path) -> list[dict]:
    reports = rank_reports(folder)
    assert [report["process"]["rank"] for report in reports] == [str(rank) for rank in range(RANKS)]
    return reports


def test_verls_sft_trainer_trains_on_the_cluster_with_the_overlay(cluster, data, tmp_path):
    replaced = ("trainer.default_local_dir", "trainer.test_freq")
    arguments = [a for a in trainer_arguments(data, steps=4) if not a.startswith(replaced)]
    arguments += ["trainer.test_freq=1"]  # so that a validation does not only lie in the last second
    arguments += [f"trainer.n_gpus_per_node={RANKS}", "trainer.nnodes=1", f"trainer.default_local_dir={tmp_path}/ckpt"]
    command = [sys.executable, "-m", "verl.trainer.sft_trainer_ray", *arguments]
    run_driver(command, driver_environment(cluster, tmp_path / "reports"), tmp_path)
    # verl looks at trainer.device in the driver; from 0.9 on that hook is not required.
    of_driver = ["chip.configured_device"] if version("verl") < "0.9" else []
    for report in worker_reports(tmp_path):
        assert report["verl"]["supported"]
        assert report["phase"]["counts"]["train_batch"] >= 1  # Ray kills its actors: the last second is not reported
        assert never_called(report) == of_driver
        assert report["environment"]["TEFL_LOG_LEVEL"] == "WARNING"
        assert report["problems"] == []


GROUP = """
    import json, os, time, ray
    {init}
    import verl
    {then}
    from functools import partial
    from real_engine import configs, make_batch
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
    from verl.workers.utils.losses import sft_loss
    from verl.utils import tensordict_utils as tu

    parts = configs({model!r}, "fsdp2", "lm")
    config = TrainingWorkerConfig(model_type="language_model", **parts)
    pool = RayResourcePool([{ranks}], use_gpu=True, max_colocate_count=1)
    workers = RayWorkerGroup(
        pool, RayClassWithInitArgs(ray.remote(TrainingWorker), config=config), device_name="cpu", **{extra}
    )
    workers.set_loss_fn(partial(sft_loss, config=None))
    workers.reset()
    batch = make_batch()
    tu.assign_non_tensor(batch, update_lr_scheduler=True, global_token_num=[8] * 4)
    for _ in range(2):
        time.sleep(1.1)  # a report is written at most once a second, and Ray kills its actors
        metrics = tu.get(workers.train_batch(batch).get(), "metrics")
    print("LOSS", metrics["loss"])

    @ray.remote
    def variables():
        return dict(os.environ)

    print("PLAIN TASK", json.dumps(ray.get(variables.remote())))

    @ray.remote
    def killed():
        import verl
        os.kill(os.getpid(), 9)

    try:
        ray.get(killed.options(max_retries=0).remote())
    except ray.exceptions.WorkerCrashedError:
        print("KILLED")
"""


def run_group(data, environment, tmp_path, *, init, then="", extra="{}"):
    code = textwrap.dedent(GROUP).format(init=init, then=then, model=str(data / "model"), ranks=RANKS, extra=extra)
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests.parent / "examples"), environment.get("PYTHONPATH", "")]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    out = run_driver([sys.executable, "-c", code], environment, tmp_path)
    assert "LOSS" in out
    return json.loads(next(line for line in out.splitlines() if "PLAIN TASK" in line).split("PLAIN TASK ")[1])


def test_only_the_stacks_variables_are_forwarded_and_every_process_reports(cluster, data, tmp_path):
    environment = driver_environment(cluster, tmp_path / "reports")
    task = run_group(data, environment, tmp_path, init="", then="ray.init()")
    assert task["VERL_USE_EXTERNAL_MODULES"] == "verl_fl_overlay"
    assert task["TEFL_LOG_LEVEL"] == "WARNING"
    assert task["SGLANG_FL_NEWER"] == "1"
    assert not {"SOME_API_KEY", "FLAGGEMS_DB_URL", "FLAGCX_HOSTID"} & task.keys()
    for report in worker_reports(tmp_path):
        assert report["phase"]["counts"]["train_batch"] == 2
    reports = [json.loads(file.read_text()) for file in (tmp_path / "reports").glob("*.json")]
    programs = sorted(report["process"]["program"] for report in reports)
    assert programs == ["-c", *["workers/default_worker.py"] * (RANKS + 1)], "the driver, the ranks, the killed task"
    told = reports[0]["features"]["ray"]["detail"]
    assert {"SGLANG_FL_NEWER", "TEFL_LOG_LEVEL"} <= set(told["forwarded"])
    assert "SOME_API_KEY" not in json.dumps(reports)


def test_workers_of_a_ray_that_was_started_before_verl_get_the_overlay(cluster, data, tmp_path):
    environment = driver_environment(cluster, tmp_path / "reports")
    task = run_group(data, environment, tmp_path, init="ray.init()")
    assert "VERL_USE_EXTERNAL_MODULES" not in task
    for report in worker_reports(tmp_path):
        assert report["phase"]["counts"]["train_batch"] == 2
        assert report["environment"]["TEFL_LOG_LEVEL"] == "WARNING"


def test_the_users_own_runtime_environment_wins(cluster, data, tmp_path):
    environment = driver_environment(cluster, tmp_path / "reports")
    own = 'ray.init(runtime_env={"env_vars": {"TEFL_LOG_LEVEL": "ERROR", "VLLM_FL_STRICT": "1"}})'
    run_group(data, environment, tmp_path, init="", then=own, extra='{"worker_env": {"VLLM_FL_STRICT": "0"}}')
    for report in worker_reports(tmp_path):
        assert report["environment"]["TEFL_LOG_LEVEL"] == "ERROR"
        assert report["environment"]["VLLM_FL_STRICT"] == "0"


def run_plain(environment, tmp_path, code):
    """Run a driver that prints JSON after "TOLD "."""
    out = run_driver([sys.executable, "-c", textwrap.dedent(code)], environment, tmp_path)
    return json.loads(next(line for line in out.splitlines() if line.startswith("TOLD ")).removeprefix("TOLD "))


@pytest.mark.parametrize("submitted", [False, True])
def test_the_runtime_environment_of_a_job_config_goes_first_too(cluster, tmp_path, submitted):
    """A submitted job's takes its place, with Ray alone and with the overlay."""
    environment = driver_environment(cluster, tmp_path / "reports")
    if submitted:
        environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": {"MINE": "job"}}})
    task = run_plain(
        environment,
        tmp_path,
        """
        import json, os, ray, verl
        ray.init(job_config=ray.job_config.JobConfig(
            runtime_env={"env_vars": {"MINE": "driver", "TEFL_LOG_LEVEL": "ERROR"}}
        ))
        print("TOLD " + json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote())))
        """,
    )
    assert [task["MINE"], task["TEFL_LOG_LEVEL"]] == (["job", "WARNING"] if submitted else ["driver", "ERROR"])
    assert task["VERL_USE_EXTERNAL_MODULES"] == "verl_fl_overlay"


def test_a_submitted_job_keeps_its_own_variables(cluster, tmp_path):
    """Ray refuses a driver that names a variable which `ray job submit` was given."""
    environment = driver_environment(cluster, tmp_path / "reports")
    submitted = {"runtime_env": {"env_vars": {"TEFL_LOG_LEVEL": "WARNING", "VERL_FL_DEVICE": "cpu"}}, "metadata": {}}
    environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(submitted)
    task = run_plain(
        environment,
        tmp_path,
        """
        import json, os, ray, verl
        ray.init()
        variables = ray.remote(lambda: {k: v for k, v in os.environ.items() if k.startswith(("VERL", "TEFL"))})
        print("TOLD " + json.dumps(ray.get(variables.remote())))
        """,
    )
    assert task["TEFL_LOG_LEVEL"] == "WARNING"
    assert task["VERL_FL_DEVICE"] == "cpu"
    assert task["VERL_USE_EXTERNAL_MODULES"] == "verl_fl_overlay"


def test_a_rollout_server_on_another_node_has_the_overlay_and_the_longer_lists(cluster, tmp_path):
    """The driver hands on what the user set; the chip's own names are added where the plugin is."""
    vllm_plugin.write(tmp_path / "site")
    environment = driver_environment(cluster, tmp_path / "reports")
    environment |= {"GEMS_VENDOR": "metax", "VLLM_FL_FLAGOS_BLACKLIST": "softmax"}
    code = f"""
        import json, os, ray, verl
        ray.init(runtime_env={{"env_vars": {{"PYTHONPATH": {str(tmp_path / "site")!r}}}}})

        @ray.remote(resources={{"second": 1}}, num_cpus=0)
        def serve():
            import verl, vllm_fl
            from verl_fl_overlay.activation import active
            vllm_fl.register()
            read, _ = json.loads(vllm_fl.in_a_worker("metax"))
            return [active().settings.given["VLLM_FL_FLAGOS_BLACKLIST"], read, ray.get_runtime_context().get_node_id()]

        *told, node = ray.get(serve.remote())
        print("TOLD " + json.dumps([*told, node != ray.get_runtime_context().get_node_id()]))
    """
    read = {"flagos_blacklist": ["softmax", "copy_", "index"], "oot_blacklist": ["rotary_embedding"]}
    assert run_plain(environment, tmp_path, code) == ["softmax", read, True]
