from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import before_others, of_the_stack, run

for name in filter(of_the_stack, list(os.environ)):
    if name != "VERL_WHEELS":  # the tests' own
        del os.environ[name]  # what a developer has set there is no part of any test

if "VERL_WHEELS" in os.environ:  # all that a test fetches comes from there, by pip or uv, and no index is asked
    wheels = str(Path(os.environ["VERL_WHEELS"]).absolute())
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=wheels, UV_OFFLINE="1", UV_FIND_LINKS=wheels)


@pytest.fixture(autouse=True)
def overlay_off():
    """Start every test without the overlay: a module that imported both verl and our package has activated it."""
    activation = sys.modules.get("verl_fl_overlay.activation")
    if activation is not None:
        activation.deactivate()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Return the folder of the tiny Qwen2."""
    pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def experts_model(tmp_path_factory) -> Path:
    """Return the folder of a tiny Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("experts")
    program = "import sys; from pathlib import Path; import ranks; ranks.write_experts(Path(sys.argv[1]), ranks.TINY)"
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    done = run("-c", program, folder, env=before_others(benchmarks))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
