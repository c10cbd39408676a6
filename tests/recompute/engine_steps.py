"""verl's real engines on a CPU with some layers that recompute; prints RESULT and JSON.

    python tests/recompute/engine_steps.py MODEL [--case lm:fsdp2] [--updates 2] [--memory BYTES] [--fail UPDATE:LAYER]

``--memory`` stands in for a device's memory: so much is left for an update.  Each token of a micro-batch takes 4,000
bytes while all layers recompute, and 2,000 more for each layer that keeps its activations.  ``--fail`` runs out of
memory once, in the forward of a layer in an update's second micro-batch; ``--fail UPDATE:backward`` in its backward.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl  # noqa: F401
from real_engine import join_group, make_engine, train

from verl_fl_overlay.features import recompute

PER_TOKEN, KEPT = 4_000, 2_000


class Memory:
    """A device on which only this model's micro-batches take memory."""

    def __init__(self, left: int) -> None:
        self.left, self.held, self.most, self.tokens, self.restarts = left, 0, 0, 0, 0
        self.longest = 0

    def watch(self, model: Any, layers: list[Any]) -> None:
        def begin(module: Any, args: Any, kwargs: Any) -> None:
            self.tokens, self.held = kwargs["input_ids"].numel(), 0
            self.most = max(self.most, self.tokens * PER_TOKEN)
            self.longest = max(self.longest, self.tokens)

        def keep(layer: Any, *given: Any) -> None:
            if torch.is_grad_enabled() and layer.training and not layer.gradient_checkpointing:
                self.held += self.tokens * KEPT

        model.register_forward_pre_hook(begin, with_kwargs=True)
        for layer in layers:
            layer.register_forward_hook(keep)

    def allocated(self) -> int:
        return self.held

    def peak(self) -> int:
        return self.most

    def restart_peak(self) -> None:
        self.most, self.restarts = 0, self.restarts + 1

    def available(self) -> int:
        return self.left

    def total(self) -> int:
        return self.left


class Watch:
    """Counts the forwards of each layer and fails where it was asked to."""

    def __init__(self, model: Any, fail: str) -> None:
        self.layers = [module for module in model.modules() if "self_attn" in module._modules]
        self.counts = [0] * len(self.layers)
        self.update = self.micro_batch = 0
        when, _, self.where = fail.partition(":")
        self.when = int(when or -1)
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        for index, layer in enumerate(self.layers):
            layer.self_attn.register_forward_pre_hook(lambda module, args, index=index: self.count(index))
        self.layers[0].register_forward_hook(self.after)

    def begin(self, *given: Any) -> None:
        self.micro_batch += 1

    def count(self, index: int) -> None:
        self.counts[index] += 1
        if self.fails() and self.where == str(index):
            self.when = -1
            raise torch.OutOfMemoryError("no memory, says the test")

    def fails(self) -> bool:
        return self.update == self.when and self.micro_batch == 2

    def after(self, layer: Any, args: Any, output: Any) -> None:
        """Fail in the backward pass of a layer's output."""

        def fail(gradient: Any) -> None:
            self.when = -1
            raise torch.OutOfMemoryError("no memory, says the test")

        hidden = output[0] if isinstance(output, tuple) else output
        if self.fails() and self.where == "backward" and hidden.requires_grad:
            hidden.register_hook(fail)

    def step(self, engine: Any, head: str) -> dict[str, Any]:
        self.counts[:] = [0] * len(self.layers)
        self.update, self.micro_batch = self.update + 1, 0
        try:
            (numbers,) = train(engine, head, 1)
        except torch.OutOfMemoryError as error:
            return {"raised": str(error), "forwards": list(self.counts)}
        return {"forwards": list(self.counts), **{name: value.hex() for name, value in numbers.items()}}


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found.update(name.encode() + whole.detach().float().numpy().tobytes())
    return found.hexdigest()


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--case", default="lm:fsdp2")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--hf", type=json.loads, default={})
    parser.add_argument("--reentrant", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    join_group(False)
    torch.manual_seed(0)
    log, memory = Log(), Memory(options.memory // (1 + torch.distributed.get_rank()))  # the second rank has half of it
    logging.getLogger("verl_fl_overlay").addHandler(log)
    if options.memory:
        recompute.device_memory = lambda: memory
    if options.reentrant:
        from transformers import PreTrainedModel

        enable = PreTrainedModel.gradient_checkpointing_enable
        PreTrainedModel.gradient_checkpointing_enable = lambda model, **given: enable(model, {"use_reentrant": True})
    head, strategy = options.case.split(":")
    engine = make_engine(options.model, strategy, head, hf={"enable_gradient_checkpointing": True, **options.hf})
    watch = Watch(engine.module, options.fail)
    memory.watch(engine.module, watch.layers)
    updates = [watch.step(engine, head) for _ in range(options.updates)]
    from verl_fl_overlay.activation import active, report

    told = report()
    flags = [getattr(layer, "gradient_checkpointing", None) for layer in watch.layers]
    active().stop()
    result = {
        "updates": updates,
        "parameters": "" if "raised" in updates[-1] else digest(engine.module),
        "told": told["features"]["recompute"].get("detail"),
        "problems": told["problems"],
        "calls": {hook["name"]: hook["calls"] for hook in told["hooks"]},
        "log": log.said,
        "flags": flags,
        "flags after": [layer.gradient_checkpointing for layer in watch.layers],
        "hooks after": sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in watch.layers),
        "restarts": memory.restarts,
        "longest": memory.longest,
    }
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
