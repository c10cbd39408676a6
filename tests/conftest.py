from __future__ import annotations

import sys
from pathlib import Path

import pytest


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
