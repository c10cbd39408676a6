"""What the hooks add to one training step: a stub engine through verl's own base classes, hooks off and on in turn.

VERL_USE_EXTERNAL_PLUGINS=none python benchmarks/hooks.py: prints medians, microseconds a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any


def stub() -> Any:
    """Return an engine that computes nothing, on verl's own base classes."""
    from verl.workers.engine.base import BaseEngine, BaseEngineCtx

    class Mode(BaseEngineCtx):
        pass

    class Stub(BaseEngine):
        is_param_offload_enabled = is_optimizer_offload_enabled = False

        def to(self, **kwargs: Any) -> None: ...
        def optimizer_zero_grad(self) -> None: ...
        def optimizer_step(self) -> float:
            return 0.0

        def is_mp_src_rank_with_outputs(self) -> bool:
            return True

        def train_mode(self, **kwargs: Any) -> Any:
            return Mode(self, "train")

        def forward_backward_batch(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"metrics": {}}

    return Stub()


def microseconds(engine: Any, steps: int) -> float:
    """Return the time of one step (enter, train_batch, leave), microseconds."""
    begun = time.perf_counter()
    for _ in range(steps):
        with engine.train_mode():
            engine.train_batch({}, None)
    return (time.perf_counter() - begun) / steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    engine = stub()
    import verl_fl_overlay  # noqa: F401
    from verl_fl_overlay import activation

    off, on = [], []
    for _ in range(options.rounds):
        activation.deactivate()
        off.append(microseconds(engine, options.steps))
        activation.activate()
        on.append(microseconds(engine, options.steps))
    added = statistics.median(b - a for a, b in zip(off, on, strict=True))
    print(f"step of a stub engine, hooks off  {statistics.median(off):6.2f} us  (median of {options.rounds} rounds)")
    print(f"step of a stub engine, hooks on   {statistics.median(on):6.2f} us")
    print(f"added by the hooks                {added:6.2f} us")


if __name__ == "__main__":
    main()
