from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Return the folder of the tiny Qwen2."""
    pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
    from arithmetic import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder
