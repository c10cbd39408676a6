"""The README's generated tables are those of the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], cwd="/", check=False)
    assert done.returncode == 0, "run: python tools/readme.py"
