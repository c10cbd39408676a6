from __future__ import annotations

import os
from pathlib import Path

import pytest

# verl >= 0.9 finds the overlay by its entry point: a test that imports verl would leave it active for all later tests.
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Return the folder of the tiny Qwen2."""
    pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder
