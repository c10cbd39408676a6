"""The generated parts of README and docs are those of the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from verl_fl_overlay import compat
from verl_fl_overlay.devices.chips import CHIPS

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse prints help another way from 3.13 on")
def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "tools" / "pages.py", "--check"], cwd="/", check=False)
    assert done.returncode == 0, "run: python tools/pages.py"


def test_a_target_is_claimed_for_the_releases_that_have_it_and_no_others():
    """Two releases, and a hook of the same name on another target in the newer one."""
    old, other, *_ = compat.select(compat.InstalledVerl(compat.RELEASES[-1], "")).hooks
    new = dataclasses.replace(old, module="verl.elsewhere", attribute="Engines.make")
    lines = pages.hooks({"1.0": [old, other], "1.1": [new, other]}).splitlines()
    rows = [line.split(" | ")[:2] for line in lines if line.startswith("| `")]
    said = [(*re.findall(r"`(.+?)`", hook), where) for hook, where in rows]
    assert said == [
        (old.name, f"{old.module.removeprefix('verl.')}:{old.attribute}", "1.0"),
        (old.name, "elsewhere:Engines.make", "1.1"),
        (other.name, f"{other.module.removeprefix('verl.')}:{other.attribute}", "all"),
    ]


def test_a_row_of_the_chips_is_a_row_of_the_table(monkeypatch):
    lines = pages.chips().splitlines()
    monkeypatch.setitem(CHIPS, "new", dataclasses.replace(CHIPS["metax"], vendor="new", device="newt", backend=""))
    (added,) = set(pages.chips().splitlines()) - set(lines)
    assert added.startswith("| new | newt | none: FlagCX only | - | `CUDA_VISIBLE_DEVICES` | the overlay's platform |")
