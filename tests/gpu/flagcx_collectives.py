"""FlagCX's collectives under the overlay on two GPUs, by torchrun; rank 0 prints JSON.

Each asynchronous collective gets a tensor that nobody else holds, while rank 1 is late; then the memory is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import verl  # noqa: F401
from torch.distributed.distributed_c10d import _coalescing_manager
from verl.utils.distributed import initialize_global_process_group

from verl_fl_overlay.activation import active

N = 1 << 24
LATE = 2_000_000_000
"""For how many cycles of its clock rank 1 is late: about a second."""


class Told(logging.Handler):
    """Keeps what the overlay says of timeouts."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if "timeouts" in record.getMessage():
            self.lines.append(record.getMessage())


def cases(rank: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return name -> (starts the collective and returns what to wait for and what it fills, what that must hold)."""
    group = dist.group.WORLD
    new = lambda size: torch.full((size,), -2.0, device="cuda")  # noqa: E731
    mine = lambda size: torch.arange(size, device="cuda", dtype=torch.float32) % 1000 + 1000 * rank  # noqa: E731
    of = lambda owner, size: torch.arange(size, device="cuda", dtype=torch.float32) % 1000 + 1000 * owner  # noqa: E731

    def both(size: int) -> Any:
        return torch.cat([of(0, size), of(1, size)])

    def gather() -> Any:
        out = new(2 * N)
        return dist.all_gather_into_tensor(out, mine(N), async_op=True), out

    def scatter() -> Any:
        out = new(N)
        return dist.reduce_scatter_tensor(out, mine(2 * N), async_op=True), out

    def exchange() -> Any:
        out = new(2 * N)
        return dist.all_to_all_single(out, mine(2 * N), async_op=True), out

    def send() -> Any:
        out = mine(N) if rank == 0 else new(N)
        if rank == 0:
            kept, out = dist.isend(out, 1), of(0, N)
            return kept, out
        return dist.irecv(out, 0), out

    def broadcast() -> Any:
        if rank == 0:
            return dist.broadcast(mine(N), 0, async_op=True), of(0, N)
        out = new(N)
        return dist.broadcast(out, 0, async_op=True), out

    def coalesced() -> Any:
        outs = new(2 * N), new(2 * N)
        with _coalescing_manager(group, async_ops=True) as works:
            for out in outs:
                dist.all_gather_into_tensor(out, mine(N))
        return works, list(outs)

    def batched() -> Any:
        out = new(N)
        ops = [dist.P2POp(dist.isend, mine(N), 1 - rank), dist.P2POp(dist.irecv, out, 1 - rank)]
        works = dist.batch_isend_irecv(ops)
        del ops
        return works, out

    def lists() -> Any:
        outs = [new(N), new(N)]
        return dist.all_gather(outs, mine(N), async_op=True), outs

    def of_c() -> Any:
        out = functional.all_gather_tensor(mine(N), 0, group)
        return None, out

    return {
        "all_gather_into_tensor": (gather, lambda: both(N)),
        "reduce_scatter_tensor": (scatter, lambda: (of(0, 2 * N) + of(1, 2 * N))[rank * N :][:N]),
        "all_to_all_single": (exchange, lambda: torch.cat([of(k, 2 * N)[rank * N :][:N] for k in (0, 1)])),
        "isend": (send, lambda: of(0, N)),
        "broadcast": (broadcast, lambda: of(0, N)),
        "coalesced": (coalesced, lambda: torch.cat([both(N)] * 2)),
        "batch_isend_irecv": (batched, lambda: of(1 - rank, N)),
        "all_gather": (lists, lambda: both(N)),
        "functional": (of_c, lambda: both(N)),
    }


def wrong(rank: int, start: Callable[[], Any], expected: Callable[[], Any]) -> int:
    """Return how many numbers of both ranks were wrong."""
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        torch.cuda._sleep(LATE)
    works, out = start()
    noise = [torch.full((size,), -1.0, device="cuda") for size in [N] * 6 + [2 * N] * 6]
    for work in works if isinstance(works, list) else [works] if works is not None else []:
        work.wait()
    out = torch.cat(list(out)) if isinstance(out, list) else out
    found = (out + 0 != expected()).sum().cpu()
    dist.all_reduce(found)
    del noise
    return int(found)


def said(call: Callable[[], Any]) -> str:
    """Return the error that ``call`` raises, "" if none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def nccl_engine() -> None:
    """Ask verl for its checkpoint engine of NCCL; its module also imports the packages of servers."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    CheckpointEngineRegistry.get("nccl")


def main() -> None:
    told = Told()
    logging.getLogger("verl_fl_overlay").addHandler(told)
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    initialize_global_process_group()
    dist.all_reduce(torch.ones(1, device="cuda"))
    counts = {name: wrong(rank, *case) for name, case in cases(rank).items()}
    overlay = active()
    assert overlay is not None
    feature: Any = overlay.features._started["flagcx"]
    square = torch.ones(4, 4, device="cuda")
    alone = dist.new_group([0, 1], backend="flagcx")
    dist.all_reduce(torch.ones(1, device="cuda"), group=alone)
    torch.cuda.synchronize()
    queued = torch.cuda.Event()
    torch.cuda._sleep(LATE)
    queued.record()
    dist.barrier(alone)
    result = {
        "wrong": counts,
        "kept": len(feature.guards.kept),
        "described": feature.describe(),
        "slice": said(lambda: dist.all_reduce(square[:, :2])),
        "premul": said(lambda: dist.all_reduce(square, op=dist._make_nccl_premul_sum(0.5))),
        "engine": said(nccl_engine),
        "barrier waited": queued.query(),
        "told": told.lines,
        "seconds": time.process_time(),
    }
    if rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
