"""Where verl's FSDP engines and legacy workers run one micro-batch forward: it may be run once more."""

from __future__ import annotations

from functools import partial
from typing import Any

from verl_fl_overlay.compat.packing import ENGINE, OWNER, SOURCE
from verl_fl_overlay.events import repeats
from verl_fl_overlay.hooks import Call, Hook, Wrapper


def _forward(module: str) -> Wrapper:
    """Return the wrapper of a forward; ``module`` is the attribute for the model."""

    def forward(wrapped: Call, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return wrapped(*args, **kwargs)
        except Exception as error:
            if not repeats.ask(getattr(owner, module, None), error):
                raise
        # Outside of the handler: the error holds all tensors of the forward that failed.
        return wrapped(*args, **kwargs)

    return forward


def engine_hook() -> Hook:
    """Return the hook on verl's FSDP engine; VeOmni's runs the same method."""
    return Hook(
        name="recompute.forward",
        module=ENGINE,
        attribute=f"{OWNER}.forward_step",
        wrapper=_forward("module"),
        feature="recompute",
        required=False,
        why="verl's step fails when a forward runs out of memory; it is run once more with all layers recomputing.",
        upstream=f"{SOURCE}/v0.9.1/{ENGINE.replace('.', '/')}.py#L1549",
        until="verl chooses how many layers recompute by the memory that is left",
        relies_on=(f"{ENGINE}:{OWNER}.module",),
    )


def worker_hooks() -> list[Hook]:
    """Return the hooks on the legacy workers of verl 0.7."""
    hook = partial(Hook, feature="recompute", required=False, until="verl 0.8.0, which has no legacy workers")
    return [
        hook(
            name=f"recompute.forward_{name}",
            module=f"verl.workers.{name}.dp_{name}",
            attribute=f"{owner}._forward_micro_batch",
            wrapper=_forward(f"{name}_module"),
            why="as recompute.forward, in verl 0.7's default workers.",
            upstream=f"{SOURCE}/v0.7.1/verl/workers/{name}/dp_{name}.py",
            relies_on=(f"verl.workers.{name}.dp_{name}:{owner}.{name}_module",),
        )
        for name, owner in {"actor": "DataParallelPPOActor", "critic": "DataParallelPPOCritic"}.items()
    ]
