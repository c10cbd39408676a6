"""A real engine whose steps fail, and whose checkpoints are kept: what is left of the phase and of the weights.

Prints JSON.  ``python tests/faults/faulty_engine.py MODEL fail`` raises in steps; ``... save FOLDER`` trains two steps,
writes a checkpoint and trains two more; ``... resume FOLDER`` reads it and trains the last two.  ``--plain`` as in
``real_engine``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_engine


class Interrupted:
    """A loss that raises ``error`` in the second micro-batch, with part of the gradient computed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return real_engine.sft_loss()(**inputs)


def not_a_number(**inputs: Any) -> Any:
    loss, metrics = real_engine.sft_loss()(**inputs)
    return loss * float("nan"), metrics


def digest(engine: Any) -> str:
    """Return a hash of every weight's name and bytes."""
    seen = hashlib.sha256()
    for name, tensor in sorted(engine.module.state_dict().items()):
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        seen.update(name.encode() + full.detach().contiguous().cpu().numpy().tobytes())
    return seen.hexdigest()


def step(engine: Any, loss: Any) -> dict[str, Any]:
    """Train one step with ``loss``; return what came of it, and the phase's events meanwhile."""
    from verl_fl_overlay.phase import training

    events: list[str] = []
    stop = [
        training.entered.subscribe(lambda: events.append("entered")),
        training.left.subscribe(lambda: events.append("left")),
    ]
    before, raised, frames = digest(engine), None, []
    try:
        with engine.train_mode():
            engine.train_batch(real_engine.make_batch(), loss_function=loss)
    except BaseException as error:
        raised = error
        frames = [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)]
    for unsubscribe in stop:
        unsubscribe()
    return {
        "raised": [type(raised).__name__, str(raised)] if raised else None,
        "same_error": raised is getattr(loss, "error", None),
        "last_frame": frames[-1] if frames else None,
        "events": events,
        "depth": training.depth,
        "mode": engine.mode,
        "changed": digest(engine) != before,
    }


def fail(engine: Any) -> dict[str, Any]:
    import torch

    return {
        "good": step(engine, real_engine.sft_loss()),
        "out_of_memory": step(engine, Interrupted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))),
        "interrupt": step(engine, Interrupted(KeyboardInterrupt("by the user"))),
        "nan": step(engine, not_a_number),
        "good_again": step(engine, real_engine.sft_loss()),
    }


def save(engine: Any, folder: str) -> dict[str, Any]:
    first = real_engine.train(engine, "lm", 2)
    engine.save_checkpoint(local_path=folder, global_step=2)
    saved = digest(engine)
    return {"first": hexed(first), "saved": saved, "last": hexed(real_engine.train(engine, "lm", 2))}


def resume(engine: Any, folder: str) -> dict[str, Any]:
    # Not the random numbers' state, which plain verl cannot set on a CPU; nothing here draws any.
    engine.checkpoint_manager.checkpoint_load_contents = ["model", "optimizer"]
    engine.load_checkpoint(local_path=folder, del_local_after_load=False)
    return {"saved": digest(engine), "last": hexed(real_engine.train(engine, "lm", 2))}


def hexed(steps: list[dict[str, float]]) -> list[dict[str, str]]:
    return [{name: value.hex() for name, value in step.items()} for step in steps]


def main() -> None:
    import torch

    model, what, *rest = [argument for argument in sys.argv[1:] if argument != "--plain"]
    plain = "--plain" in sys.argv
    torch.manual_seed(0)
    torch.set_num_threads(1)
    import verl  # noqa: F401

    real_engine.join_group(plain)
    engine = real_engine.make_engine(model, "fsdp2", "lm", plain=plain)
    result = {"fail": fail, "save": save, "resume": resume}[what](engine, *rest)
    result["overlay"] = "verl_fl_overlay.activation" in sys.modules
    print("RESULT " + json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
