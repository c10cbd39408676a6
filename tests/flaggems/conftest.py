from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def real_gems(tmp_path_factory):
    """The installed FlagGems, as the overlay loads it."""
    from importlib.util import find_spec

    for package in ("torch", "triton", "flag_gems"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from stubs import device_probes

    from verl_fl_overlay.flaggems import library

    with pytest.MonkeyPatch.context() as patch, device_probes():
        patch.setenv("FLAGGEMS_CACHE_DIR", str(tmp_path_factory.mktemp("flaggems")))
        return library.load()


@pytest.fixture
def on_cpu(monkeypatch):
    """The stand-ins in FlagGems' place."""
    pytest.importorskip("torch")
    import stand_ins

    from verl_fl_overlay.flaggems import library

    stand_ins.calls.clear()
    monkeypatch.setattr(library, "load", stand_ins.gems)
    return stand_ins
