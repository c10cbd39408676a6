"""Rotary position embeddings: the functions of a model's files that apply them, and the kernel in their place.

A function is found by the names of its parameters.  How it rotates is found by a trial: it gets random numbers, and the
order and the layout whose formula gives the same numbers are its own.  The kernel is then checked with these.

The function object stays where it is, and runs other code.  So a model that refers to it can be pickled, since its name
still leads to the same object; files that imported it by name run the kernel too; and to take the kernel out is exact,
whatever other code has put into the file since.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_fl_overlay.kernels import pairs, state
from verl_fl_overlay.kernels.agreement import MOST_CHECKS, Agreement, Pair, Samples, kernels_take
from verl_fl_overlay.kernels.pairs import Layout

ANGLES = (("cos", "sin"), ("freqs_cis",))
"""The parameters that hold angles: two real tensors, or a complex one."""

SECTIONS = "mrope_section"
"""The parameter that says how many pairs turn by each of a token's three positions."""

Heads = tuple[Tensor, ...]
"""q and k, or one of them."""


def functions(model: Any) -> Iterator[FunctionType]:
    """Yield the native functions that rotate heads, in the files that define classes of the model.

    A function that calls another one of its file is left alone, since the other one is replaced.
    """
    for name in sys.modules.keys() & {type(module).__module__ for module in model.modules()}:
        own = {
            key: value
            for key, value in vars(sys.modules[name]).items()
            if type(value) is FunctionType and value.__module__ == name and (_is_replaced(value) or _rotates(value))
        }
        for function in own.values():
            if not _is_replaced(function) and own.keys().isdisjoint(function.__code__.co_names):
                yield function


def replace(function: Any, agreement: Agreement) -> None:
    """Let ``function`` run the kernel where it agrees; its ``__wrapped__`` is the native function then."""
    native = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    native.__qualname__, native.__kwdefaults__ = function.__qualname__, function.__kwdefaults__
    function.__wrapped__ = native
    function.__kwdefaults__ = {"_run": in_place_of(native, agreement)}
    function.__code__, function.__defaults__ = _call.__code__, None


def restore(function: Any) -> None:
    """Take the kernel out of a function that was replaced."""
    native = function.__wrapped__
    function.__code__, function.__defaults__ = native.__code__, native.__defaults__
    function.__kwdefaults__ = native.__kwdefaults__
    del function.__wrapped__


def _call(*inputs: Any, _run: Callable[..., Any], **named: Any) -> Any:
    """Gives its code to each function that is replaced, which has ``_run`` as a default."""
    return _run(*inputs, **named)


def _is_replaced(function: FunctionType) -> bool:
    return function.__code__ is _call.__code__


def _rotates(function: FunctionType) -> bool:
    """Whether its parameters are one or two tensors of heads, then angles.  Code cannot be given to a closure."""
    return function.__closure__ is None and bool(_angles(_parameters(function)))


def _parameters(function: FunctionType) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _angles(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that are angles, after one or two others; empty if there are none."""
    return next((each for each in ANGLES for first in (1, 2) if names[first : first + len(each)] == each), ())


class Order(NamedTuple):
    """The order of a function's dimensions.

    Attributes:
        heads: how many dimensions a tensor of heads has: 4, or 3 without a batch.
        angles: how many dimensions cos has.
        counted: which dimension of (batch, ?, ?, size) counts heads: 1 or 2; the other one counts tokens.
        positions: how many positions a token has: 1 or 3.
    """

    heads: int
    angles: int
    counted: int
    positions: int

    def batched(self, heads: Tensor) -> Tensor:
        """Return heads as (batch, heads, length, size)."""
        heads = heads if self.heads == 4 else heads[None]
        return heads if self.counted == 1 else heads.transpose(1, 2)

    def of_heads(self, batched: Tensor) -> Tensor:
        """Return (batch, heads, length, size) in the function's order."""
        heads = batched if self.counted == 1 else batched.transpose(1, 2)
        return heads if self.heads == 4 else heads[0]

    def rows(self, angles: Tensor) -> Tensor:
        """Return angles as (batch or 1, length, width), after a dimension of 3 where a token has three positions."""
        if self.angles == 4 and self.positions == 1:
            return angles.select(self.counted, 0)
        return angles if self.angles > 2 else angles[None]

    def of_angles(self, rows: Tensor) -> Tensor:
        """Return what ``rows`` gives in the function's order."""
        if self.angles == 4 and self.positions == 1:
            return rows.unsqueeze(self.counted)
        return rows if self.angles > 2 else rows[0]


class Way(NamedTuple):
    """How a function rotates."""

    order: Order
    layout: Layout


class Form(NamedTuple):
    """What a call has that decides how its function rotates.

    Attributes:
        heads: dimensions of a tensor of heads.
        angles: dimensions of cos.
        size: elements of a head.
        width: elements of a row of cos.
        rest: all arguments beside heads and angles, as a part of a key.
    """

    heads: int
    angles: int
    size: int
    width: int
    rest: Any


Run = Callable[[Heads, Tensor, Tensor], Heads]


def in_place_of(native: FunctionType, agreement: Agreement) -> Callable[..., Any]:
    """Return a function like ``native``, a rotation of q and k or of one tensor, that runs the kernel where it agrees.

    Native code computes calls whose angles are not one row for each token, calls that need a gradient to angles, and
    calls under a transform of torch.func or in forward mode.
    """
    from verl_fl_overlay.kernels.triton.rotary import rotate

    parameters = _parameters(native)
    of_angles = _angles(parameters)
    of_heads = parameters.index(of_angles[0])
    needed = parameters[: of_heads + len(of_angles)]
    ways: dict[Any, Way | None] = {}

    def apply_rotary(*inputs: Any, **named: Any) -> Any:
        results = None if torch.compiler.is_compiling() else by_kernel(inputs, named)
        if results is None:
            return native(*inputs, **named)
        return results if of_heads == 2 else results[0]

    def by_kernel(inputs: tuple[Any, ...], named: dict[str, Any]) -> Heads | None:
        rest: dict[str, Any] = {}
        if named or len(inputs) != len(needed):
            rest = {**dict(zip(parameters, inputs, strict=False)), **named}
            if len(rest) != len(inputs) + len(named) or not rest.keys() >= set(needed):
                return None
            inputs = tuple(map(rest.pop, needed))
        heads = inputs[:of_heads]
        cos, sin = _real(*inputs[of_heads:])
        if not _kernel_takes(heads, cos, sin):
            return None

        first = heads[0]
        form = Form(first.dim(), cos.dim(), first.shape[-1], cos.shape[-1], state.of(rest) if rest else ())
        if form not in ways:
            if len(ways) == MOST_CHECKS:  # its arguments change from call to call
                return None
            run = functools.partial(as_real, rest)
            ways[form] = None if state.unseen(form) else _way(run, form, of_heads, rest.get(SECTIONS), first.device)
        way = ways[form]
        batched = tuple(map(way.order.batched, heads)) if way else ()
        # The kernel is compiled for the number of heads and their size.
        counts = tuple([each.shape[1] for each in batched])
        key = ("rotary", native, first.dtype, cos.dtype, form, counts)
        if not agreement.agree(key, first.device, pair, key, rest) or not way or not _fit(batched, cos, way.order):
            return None
        return tuple(map(way.order.of_heads, rotate(batched, way.order.rows(cos), way.order.rows(sin), way.layout)))

    def as_real(rest: dict[str, Any], heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
        results = native(*heads, *((cos, sin) if len(of_angles) == 2 else (torch.complex(cos, sin),)), **rest)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def pair(samples: Samples, key: Any, rest: dict[str, Any]) -> Pair:
        *_, dtype, form, counts = key
        return _pair(samples, functools.partial(as_real, rest), rotate, form, ways[form], counts, dtype)

    return apply_rotary


def _real(*angles: Any) -> tuple[Any, Any]:
    """Return cos and sin; a complex tensor holds both."""
    if len(angles) == 2:
        return angles
    (both,) = angles
    return torch.view_as_real(both).unbind(-1) if type(both) is Tensor and both.is_complex() else (both, both)


def _kernel_takes(heads: tuple[Any, ...], cos: Any, sin: Any) -> bool:
    """Whether the kernel takes these types, and computes all derivatives that are needed."""
    if not kernels_take(*heads, cos, sin) or cos.requires_grad or sin.requires_grad:
        return False
    first, last = heads[0], heads[-1]
    alike: bool = first.dtype == last.dtype and cos.dtype == sin.dtype and first.shape[-1] == last.shape[-1]
    dimensions: bool = 3 <= first.dim() == last.dim() <= 4 and 2 <= cos.dim() <= 4 and cos.shape == sin.shape
    return alike and dimensions


def _fit(batched: Heads, cos: Tensor, order: Order) -> bool:
    """Whether each token has a row of angles: its own, or one for its place in all rows of the batch."""
    batch, _, length, _ = batched[0].shape
    if batched[-1].shape[::2] != (batch, length):
        return False
    if order.angles == 4 and order.positions == 1 and cos.shape[order.counted] != 1:
        return False
    *positions, rows, tokens, _ = order.rows(cos).shape
    return positions == [3] * (order.positions > 1) and tokens == length and rows in (1, batch)


def _drawn(samples: Samples, form: Form, order: Order, counts: tuple[int, ...]) -> tuple[Heads, Tensor, Tensor]:
    """Return heads, cos and sin in the function's order, fp32 on the CPU, of 6 tokens in each row of the batch."""
    # Real angles have equal halves, the normal numbers do not: each of the two shows errors that the other hides.
    token = torch.tensor([[0.0, 1, 7, 1000], [3, 2, 90, 30000]][: 2 if order.heads == 4 and order.angles > 2 else 1])
    half = token[..., None] / 10000 ** torch.linspace(0, 1, (form.width + 1) // 2)
    angles = torch.cat([half, half], -1)[..., : form.width]
    angles = angles.expand(3, -1, -1, -1) if order.positions > 1 else angles
    cos, sin = (
        torch.cat([of(angles), samples.normal(*angles.shape[:-2], 2, form.width)], -2) for of in (torch.cos, torch.sin)
    )
    heads = tuple(samples.rows((1, 30)[: order.heads - 2], count, 6, form.size) for count in counts)
    return tuple(map(order.of_heads, heads)), order.of_angles(cos), order.of_angles(sin)


def _way(run: Run, form: Form, tensors: int, sections: Any, device: torch.device) -> Way | None:
    """Return how ``run`` rotates: the order and layout whose formula gives the same numbers; None if none does."""
    sections = sections if isinstance(sections, list | tuple) else ()
    for counted in (1, 2):
        order = Order(form.heads, form.angles, counted, 3 if sections else 1)
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.device("cpu"):
            drawn, cos, sin = _drawn(Samples(), form, order, (3, 5)[:tensors])
            drawn, cos, sin = tuple(each.to(device) for each in drawn), cos.to(device), sin.to(device)
            try:
                expected = run(drawn, cos, sin)
            except Exception:  # the function does not take this order
                continue
            for layout in pairs.layouts(form.size, form.width, sections):
                found = (pairs.rotated(order.batched(x), order.rows(cos), order.rows(sin), layout) for x in drawn)
                if all(map(_same, map(order.of_heads, found), expected)):
                    return Way(order, layout)
    return None


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def _pair(
    samples: Samples,
    run: Run,
    kernel: Callable[..., Heads],
    form: Form,
    way: Way | None,
    counts: tuple[int, ...],
    dtype: torch.dtype,
) -> Pair:
    """Make what is compared; cos and sin are of type ``dtype``."""
    if way is None:
        raise ValueError("it rotates in a way that the kernel does not have")
    order, layout = way
    drawn, *angles = _drawn(samples, form, order, counts)

    def native(*heads: Tensor) -> Heads:
        return run(heads, *(each.to(heads[0].device, dtype) for each in angles))

    def fused(*heads: Tensor) -> Heads:
        rows = (order.rows(each.to(heads[0].device, dtype)) for each in angles)
        return tuple(map(order.of_heads, kernel(tuple(map(order.batched, heads)), *rows, layout)))

    return drawn, native, fused
