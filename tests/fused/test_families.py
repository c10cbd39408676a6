"""The table of families in docs/ is what tiny models give."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import run

from verl_fl_overlay import compat

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "families.md"


def of_the_newest_release():
    """Return the transformers that the newest release of verl is tested with."""
    newest = ROOT / "compat" / "constraints" / f"verl-{compat.RELEASES[-1]}.txt"
    return re.search(r"^transformers==(\S+)", newest.read_text(), re.M)[1]


def test_the_table_is_made_with_the_transformers_of_the_newest_release():
    assert f"With transformers {of_the_newest_release()}:" in TABLE.read_text()


def test_the_table_is_what_tiny_models_give():
    if version("transformers") != of_the_newest_release():
        pytest.skip("the table is made with another transformers")
    done = run(ROOT / "tools" / "families.py", "--check", env={}, timeout=280)
    assert done.returncode == 0, done.stderr[-9000:]
