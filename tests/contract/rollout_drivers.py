"""Drivers up to the moment before they start Ray: which of them end, and what is said.  Prints JSON, one a case.

python tests/contract/rollout_drivers.py [--vllm VERSION [REQUIREMENT ...]]
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

CLUSTER = "10.0.0.1:6379"
VARIABLES = {"RAY_ADDRESS": CLUSTER, "RAY_RUNTIME_ENV_HOOK": "a.module.hook"}
BROUGHT = {"runtime_env": {"env_vars": {"PYTHONPATH": "/there"}}}


def configured(name: str, ray: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "actor_rollout_ref": {"rollout": {"name": name}},
        "ray_kwargs": {"ray_init": {"num_cpus": 1, **(ray or {})}},
        **more,
    }


def reward_model(enable: bool) -> dict[str, Any]:
    return {"reward": {"reward_model": {"enable": enable, "rollout": {"name": "vllm"}}}}


def teacher(enabled: bool) -> dict[str, Any]:
    return {"distillation": {"enabled": enabled, "teacher_models": {"one": {"inference": {"name": "sglang"}}}}}


CASES: dict[str, dict[str, Any]] = {
    "vllm": configured("vllm"),
    "sglang": configured("sglang"),
    "trtllm": configured("trtllm"),
    "reward model": configured("hf", **reward_model(True)),
    "teacher": configured("hf", **teacher(True)),
    "both on a cluster": configured("vllm", {"address": CLUSTER}, **reward_model(True)),
    "address": configured("vllm", {"address": CLUSTER}),
    "Ray client": configured("vllm", {"address": "ray://10.0.0.1:10001"}),
    "pip": configured("vllm", {"runtime_env": {"pip": ["vllm"]}}),
    "PYTHONPATH": configured("vllm", BROUGHT),
    "RAY_ADDRESS": configured("vllm"),
    "RAY_RUNTIME_ENV_HOOK": configured("vllm"),
    "a cluster's folder": configured("vllm"),
    "verl's defaults": configured("vllm"),
    "somebody's own": configured("hf"),
    "reward model that is off": configured("hf", **reward_model(False)),
    "teacher that is off": configured("hf", **teacher(False)),
    "SFT": {"model": {"path": "m"}},
}


def install_vllm(folder: str, version: str, *requirements: str) -> None:
    """Put a vLLM of this version, which asks for these packages, before all that is installed."""
    module, told = Path(folder, "vllm"), Path(folder, f"vllm-{version}.dist-info")
    module.mkdir()
    (module / "__init__.py").touch()
    told.mkdir()
    asked = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n{asked}")
    sys.path.insert(0, folder)


def main() -> None:
    packages = tempfile.TemporaryDirectory()
    if "--vllm" in sys.argv:
        install_vllm(packages.name, *sys.argv[sys.argv.index("--vllm") + 1 :])
    import verl
    from omegaconf import OmegaConf
    from verl.utils.device import auto_set_device

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("verl_fl_overlay").addHandler(handler)
    told = {}
    clusters = tempfile.TemporaryDirectory()
    Path(clusters.name, "ray_current_cluster").write_text(CLUSTER)
    CASES["a cluster's folder"]["ray_kwargs"]["ray_init"]["_temp_dir"] = clusters.name
    defaults = Path(verl.__file__).with_name("trainer") / "config" / "_generated_ppo_trainer.yaml"
    for case, configuration in CASES.items():
        said.clear()
        if case in VARIABLES:
            os.environ[case] = VARIABLES[case]
        beside = OmegaConf.load(defaults) if case == "verl's defaults" else {}
        try:
            auto_set_device(OmegaConf.merge(beside, {**configuration, "trainer": {"device": "cpu"}}))
            told[case] = {"raised": "", "said": list(said)}
        except RuntimeError as error:
            told[case] = {"raised": f"{type(error).__name__}: {error}", "said": list(said)}
        os.environ.pop(case, None)
    started = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    print("RESULT " + json.dumps({"cases": told, "Ray was started": started}))


if __name__ == "__main__":
    main()
