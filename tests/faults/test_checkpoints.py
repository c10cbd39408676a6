"""Checkpoints: the same bytes with and without the overlay, each resumed by the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, PLAIN, run

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = pytest.mark.xdist_group("checkpoints")  # they share the run

PROGRAM = Path(__file__).with_name("faulty_engine.py")
# With verl's own log-probs: the overlay's are fp32 where verl rounds to bf16, which trains to other weights.
WITH, WITHOUT = ({**OVERLAY, "VERL_FL_DISABLE": "logprobs.fsdp,entropy.fsdp"},), (PLAIN, "--plain")


def result(model, what, folder, side):
    env, *flags = side
    done = run(PROGRAM, model, what, folder, *flags, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert found["overlay"] == (side is WITH)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {"with": tmp_path_factory.mktemp("with"), "without": tmp_path_factory.mktemp("without")}


@pytest.fixture(scope="module")
def saved(tiny_model, folders):
    return {
        "with": result(tiny_model, "save", folders["with"], WITH),
        "without": result(tiny_model, "save", folders["without"], WITHOUT),
    }


def weights(folder: Path, kind: str):
    import torch

    (file,) = folder.glob(f"{kind}_world_size_1_rank_0.pt")
    return torch.load(file, weights_only=False)


def test_training_and_weights_are_the_same(saved):
    assert saved["with"]["first"] == saved["without"]["first"]
    assert saved["with"]["saved"] == saved["without"]["saved"]


def test_files_hold_the_same_keys_and_bytes(saved, folders):
    with_overlay, without = weights(folders["with"], "model"), weights(folders["without"], "model")
    assert list(with_overlay) == list(without)
    for name, tensor in with_overlay.items():
        assert tensor.to_local().numpy().tobytes() == without[name].to_local().numpy().tobytes(), name
    names = [sorted(file.name for file in folders[side].iterdir()) for side in ("with", "without")]
    assert names[0] == names[1]


@pytest.mark.parametrize(("writer", "reader"), [("with", WITHOUT), ("without", WITH)], ids=["leave", "join"])
def test_a_checkpoint_resumes_on_the_other_side(saved, folders, tiny_model, writer, reader):
    resumed = result(tiny_model, "resume", folders[writer], reader)
    assert resumed["saved"] == saved[writer]["saved"]
    assert resumed["last"] == saved[writer]["last"], "the two steps after it are those of the uninterrupted run"
