"""Guards around torch's collectives in FlagCX's process groups, for what FlagCX does wrong without a word.

All collectives, of ``torch.distributed``, functional ones and those that C++ calls, are operators ``c10d::*``.  One
kernel on the dispatch key BackendSelect, which comes before every device's own kernels, sees them all and goes on to
those.  Groups of other backends pass through it untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import wrapt

from verl_fl_overlay.errors import FlagCXError

COALESCED = ("allreduce_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")
POINT_TO_POINT = ("send", "recv_")
ON_LISTS = ("allgather_", "reduce_scatter_", "gather_", "scatter_", "alltoall_")
ON_TENSORS = ("broadcast_", "allreduce_", "reduce_", "_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")
WHOLE = {
    **dict.fromkeys(("_allgather_base_", "allgather_into_tensor_coalesced_", "allgather_", "gather_"), 0),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_", "scatter_"), 1),
}
"""Operators with a whole and its parts, one for each rank -> which argument the whole is: the output (0), the input."""
OPERATORS = (*COALESCED, *POINT_TO_POINT, *ON_LISTS, *ON_TENSORS, "barrier")
KEPT = 32
"""How many works' tensors are kept at most: before one more, the stream of the caller waits for the oldest work."""


class Kept(NamedTuple):
    """A work that no stream is known to wait for, its group's name, and its tensors."""

    work: Any
    group: str
    tensors: list[Any]


class Collectives:
    """The guards that are on, by name: ``memory``, ``contiguous``, ``sizes``, ``barrier``, ``reductions``.

    ``memory``: the tensors of a collective live until a stream waits for it, or for a later one of its group: these run
    one after the other, and where C++ waits, unseen, the later one releases them.  ``contiguous``: a tensor with gaps
    is refused.  ``sizes``: an output and an input that do not fit each other are refused.  ``barrier``: it waits for
    the kernels that were queued before.  ``reductions``: one that FlagCX lacks is refused with what to do.  Other names
    do nothing here.
    """

    def __init__(self, backend: str) -> None:
        self.on: set[str] = set()
        self.kept: dict[int, Kept] = {}
        """By the id of the work; the oldest is first."""
        self._backend = backend
        self._open: dict[str, list[Any]] = {}
        """Group's name -> the tensors of its operators since it began to gather them into one."""
        self._undo: list[Callable[[], Any]] = []

    def put_on(self, guard: str) -> None:
        """Put on a guard; the first one registers the kernels."""
        if not self._undo:
            self._register()
        self.on.add(guard)

    def remove(self) -> None:
        """Take all guards off again."""
        while self._undo:
            self._undo.pop()()
        for kept in list(self.kept.values()):
            kept.work.wait()
            _hand_over(kept)
        self.on.clear()
        self.kept.clear()
        self._open.clear()

    def _register(self) -> None:
        import torch
        from torch.distributed import ProcessGroup, Work

        kernels = [torch.library.Library(name, "IMPL") for name in ("c10d", "_c10d_functional")]
        self._undo = [library._destroy for library in kernels]
        for name in OPERATORS:
            operator = getattr(torch.ops.c10d, name).default
            kernels[0].impl(name, self._kernel(name, operator), "BackendSelect", with_keyset=True)
        waiting = self._functional_wait(torch.ops._c10d_functional.wait_tensor.default)
        kernels[1].impl("wait_tensor", waiting, "BackendSelect", with_keyset=True)
        for owner, name, wrapper in (
            (ProcessGroup, "_start_coalescing", self._begin),
            (ProcessGroup, "_end_coalescing", self._end),
            (Work, "wait", self._wait),
        ):
            handle = wrapt.wrap_object(owner, name, wrapt.FunctionWrapper, (wrapper,))
            self._undo.append(partial(wrapt.unwrap_object, owner, name, handle, missing_ok=True))

    def _kernel(self, name: str, operator: Any) -> Callable[..., Any]:
        import torch
        from torch.distributed import ProcessGroup, Work
        from torch.distributed.distributed_c10d import _world

        group_at = [argument.name for argument in operator._schema.arguments].index("process_group")
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

        def kernel(keys: Any, *given: Any) -> Any:
            keys = keys & below
            group = ProcessGroup.unbox(given[group_at])
            tensors = list(_tensors(given))
            backends = str(_world.pg_backend_config.get(group, "")).split(",")
            if not tensors or f"{tensors[0].device.type}:{self._backend}" not in backends:
                return operator.redispatch(keys, *given)
            if "contiguous" in self.on and not all(tensor.is_contiguous() for tensor in tensors):
                _refuse_gaps(name, given)
            if "sizes" in self.on:
                _refuse_sizes(name, given, group.size())
            if "barrier" in self.on and name == "barrier":
                torch.get_device_module(tensors[0].device).current_stream(tensors[0].device).synchronize()
            try:
                result = operator.redispatch(keys, *given)
            except ValueError as error:
                if "reductions" in self.on and "ReduceOp" in str(error):
                    raise _no_reduction(name, error) from error
                raise
            if "memory" not in self.on or name == "barrier":
                return result
            if group.group_name in self._open:
                self._open[group.group_name] += tensors
                return result
            work = Work.unbox(result[-1] if isinstance(result, tuple | list) else result)
            self._keep(work, group.group_name, tensors)
            if name in ON_LISTS:
                work.wait()  # FlagCX copies the lists, and has freed the copies already
            return result

        return kernel

    def _functional_wait(self, operator: Any) -> Callable[..., Any]:
        import torch

        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

        def kernel(keys: Any, tensor: Any) -> Any:
            waited = operator.redispatch(keys & below, tensor)
            for key, kept in list(self.kept.items()):
                if any(one is tensor for one in kept.tensors):
                    self._release(key)
            return waited

        return kernel

    def _begin(self, wrapped: Callable[..., Any], group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begun = wrapped(*args, **kwargs)
        self._open[group.group_name] = []
        return begun

    def _end(self, wrapped: Callable[..., Any], group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = self._open.pop(group.group_name, [])
        work = wrapped(*args, **kwargs)
        if tensors:
            self._keep(work, group.group_name, tensors)
        return work

    def _wait(self, wrapped: Callable[..., Any], work: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        waited = wrapped(*args, **kwargs)
        self._release(id(work))
        return waited

    def _keep(self, work: Any, group: str, tensors: list[Any]) -> None:
        if work is None:  # somebody has FlagCX gather operators past torch
            return
        self.kept[id(work)] = Kept(work, group, tensors)
        for oldest in list(self.kept.values())[:-KEPT]:  # a list, since another thread may keep or release meanwhile
            oldest.work.wait()
            _hand_over(oldest)

    def _release(self, waited: int) -> None:
        """Let go of a work that the caller's stream waits for, and of its group's before it, which end before it."""
        before = list(self.kept.items())
        kept = self.kept.pop(waited, None)
        for key, older in before:
            if kept is None or key == waited:
                return
            if older.group == kept.group:
                self.kept.pop(key, None)
                _hand_over(older)


def _hand_over(kept: Kept) -> None:
    """Have torch's allocator keep the tensors' memory for the caller's stream, which waits for their work."""
    import torch

    device = kept.tensors[0].device
    stream = torch.get_device_module(device).current_stream(device)
    with torch._C._AutoDispatchBelowAutograd():
        for tensor in kept.tensors:
            tensor.record_stream(stream)


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the tensors in an operator's arguments, from within lists too."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _refuse_gaps(name: str, given: tuple[Any, ...]) -> None:
    """Raise for a tensor whose numbers are not all that lies in its memory, by NCCL's rule.

    Coalesced and point-to-point operators take any dense tensor.  Of a list of equal tensors FlagCX makes copies.
    """
    from torch._prims_common import suggest_memory_format

    for value in given:
        tensors = list(_tensors([value]))
        if name in ON_LISTS and len(tensors) > 1 and len({tensor.shape for tensor in tensors}) == 1:
            continue
        for tensor in tensors:
            laid = tensor
            if name in COALESCED + POINT_TO_POINT:
                laid = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
            if not laid.is_contiguous() and not laid.is_contiguous(memory_format=suggest_memory_format(laid)):
                raise FlagCXError(
                    f"{name.strip('_')} of a tensor that is not contiguous (shape {list(tensor.shape)}, strides "
                    f"{list(tensor.stride())}): FlagCX would take whatever lies in its memory for its numbers; NCCL "
                    "refuses such a tensor too. Give it tensor.contiguous()"
                )


def _refuse_sizes(name: str, given: tuple[Any, ...], ranks: int) -> None:
    """Raise where FlagCX would read or write behind a tensor, or leave a part of it out, by NCCL's rule.

    A list of parts of different shapes is left to FlagCX, which takes it apart.
    """
    fits = True
    if name in WHOLE:
        at = WHOLE[name]
        wholes, parts = (one if isinstance(one, list | tuple) else [one] for one in (given[at], given[1 - at]))
        for whole, part in zip(wholes, parts, strict=False):  # ranks that are not the root have no whole
            tensors = list(_tensors([whole]))
            same = len({tensor.shape for tensor in tensors}) == 1
            numel = sum(tensor.numel() for tensor in tensors)
            fits &= all(tensor.dtype == part.dtype for tensor in tensors)
            fits &= numel == ranks * part.numel() if same else len(tensors) == ranks
    elif name == "alltoall_base_":
        out, into, *_ = given
        fits = out.dtype == into.dtype and (any(given[3:5]) or out.numel() == into.numel())
        for tensor, splits in zip(given[:2], given[3:5], strict=True):
            rows = len(tensor) if tensor.dim() else 1
            fits &= (len(splits), sum(splits)) == (ranks, rows) if splits else rows % ranks == 0
    if not fits:
        laid = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in _tensors(given[:2]))
        raise FlagCXError(
            f"{name.strip('_')} over {ranks} ranks of tensors that do not fit each other (output, then input: {laid}): "
            "FlagCX would read or write behind them, or leave a part out; NCCL refuses them too"
        )


def _no_reduction(name: str, error: Exception) -> FlagCXError:
    return FlagCXError(
        f"{name.strip('_')} asks for a reduction that FlagCX does not have ({error}); it has SUM, AVG, PRODUCT, MIN "
        "and MAX. PREMUL_SUM is what FSDP2 asks for where a gradient divide factor is set; "
        "set_force_sum_reduction_for_comms(True) on the model has it divide by itself"
    )
