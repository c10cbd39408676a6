"""Input that cannot be, under the overlay: verl's own error, word for word, raised by verl's code or what it calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import OVERLAY, PLAIN, result
from sft import without_images

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("bad input")  # they share the run

PROGRAM = Path(__file__).with_name("bad_input.py")
SAYS = {
    "a strategy misspelt": "fsdp3",
    "a backend the release lacks": "",
    "a model without a language head": "ViTConfig",
    "megatron-core missing": "megatron",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    ours = result(PROGRAM, folder, env={**OVERLAY, **without_images(), "VERL_FL_STRICT": "1"})
    plain = result(PROGRAM, folder, "--plain", env={**PLAIN, **without_images()})
    assert (ours["overlay"], plain["overlay"]) == (True, False)
    return ours["told"], plain["told"]


@pytest.mark.parametrize("case", SAYS)
def test_the_error_is_verls(told, case):
    ours, plain = (side[case] for side in told)
    assert SAYS[case] in ours["error"][1]
    assert ours == plain
    assert "overlay" not in ours["raised in"]
    assert "/compat/" not in ours["raised in"]
