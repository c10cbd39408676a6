"""``real_engine.py`` with verl's row-by-row function broken: it only runs through if nobody calls that function."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real_engine import main


def row_by_row(*args, **kwargs):
    raise AssertionError("verl computed log-probs one row at a time")


import verl.utils.torch_functional  # noqa: E402

verl.utils.torch_functional.logprobs_from_logits_v2 = row_by_row
main()
