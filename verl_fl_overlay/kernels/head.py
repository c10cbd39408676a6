"""Log-probs and entropy from hidden states, a part of the logits at a time, so that all logits never exist.

With hidden states X (tokens, hidden) and the weight W (vocabulary, hidden) of a model's own head, the logits are
``Z = transform(X @ W.T)``: ``transform`` is what the model does to them after its head (a soft cap, a scale), element
by element.  Forward takes some tokens at a time and keeps a number or two per token.  Backward computes the logits
again; with the gradient G of ``X @ W.T``, which ``logprobs_torch.backward`` and transform's own backward define::

    dX = G @ W
    dW = G.T @ X

A plain linear head takes some columns of the vocabulary at a time, so that each part of dW is one product, which is
accumulated in fp32 and rounded once.  Another head (adapters, a subclass) takes some tokens at a time, and its
gradients are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from verl_fl_overlay.errors import HeadError
from verl_fl_overlay.kernels import fsdp1
from verl_fl_overlay.kernels.logprobs import TokenLogprobs, empty_statistics, inverse, refuse_misfits
from verl_fl_overlay.kernels.tokens import HEAD, Statistics, TokenAnswer, TokenQuestion, Upstream

AT_ONCE, AT_ONCE_FORWARD = 1 << 28, 1 << 29
"""Most logits that exist at a time: 512 MiB in 16 bits; twice as many in forward, which holds no gradients."""

WORTH = 0.9
"""Rows with a gradient, as a part of all, from which on those without one are not taken out."""

Transform = Callable[[Tensor], Tensor]


class ChunkedHead:
    """Runs models so that they give log-probs and entropy in the place of logits.

    ``required`` raises ``HeadError`` where a model that is called turns out not to be able to.

    Attributes:
        faults: models that cannot run so -> why.
    """

    def __init__(self, tokens: TokenLogprobs, *, required: bool = False) -> None:
        self.faults: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            del model.__dict__["forward"]  # a model is pickled, and called by others, as it is
            sealed = kwargs.pop(HEAD, None)
            native = partial(type(model).forward, model, *args, **kwargs)
            if sealed is None or kwargs.get("labels") is not None:  # its own loss needs the logits
                return native()
            try:
                return _Call(model, native).answer(sealed.question, tokens)
            except HeadError as error:
                if required:
                    raise
                self.faults[model] = str(error)
                return native()

        self._forward = forward

    def fault(self, model: Any) -> str:
        """Return why ``model`` (transformers') cannot run so, "" if nothing is known against it."""
        if model in self.faults:
            return self.faults[model]
        head, name = _head(model)
        if head is None:
            return "it has no head of its own"
        if not isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
            return f"it has no module {model.base_model_prefix!r} below its head"
        if not all(tensor.is_floating_point() for tensor in _tensors(head)):
            return f"its {name} is quantised"
        if any(isinstance(part, nn.Dropout) and part.p and part.training for part in head.modules()):
            return f"its {name} has a dropout"
        if any(part is not head and _is_sharded(part) for part in head.modules()):
            return f"FSDP shards parts of its {name} by themselves"
        if isinstance(getattr(head, fsdp1.HOLDS, None), nn.Module):  # its weights are there only while FSDP1 calls it
            return f"FSDP1 shards its {name} by itself"
        if any(not _of_torch(hook) for hook in _hooks(head)) or "forward" in vars(head):
            return f"other code has a hook on its {name}"
        if "forward" in vars(model) and getattr(vars(model)["forward"], "__func__", None) is not self._forward:
            return "other code has replaced its forward"
        return ""

    def prepare(self, model: Any) -> None:
        """Let the next call of ``model`` that gets a ``Sealed`` question under the name ``HEAD`` answer it.

        That call returns {"log_probs": ..., "entropy": ..., "squares": ...}, those that are asked for, of the labels'
        shape.  If the model turns out not to be able to, it returns what it always does, and ``faults`` has it.
        """
        model.__dict__["forward"] = MethodType(self._forward, model)


def _head(model: Any) -> tuple[Any, str]:
    """Return the model's head and its name there; (None, "") if the model does not hold it itself."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, child in model._modules.items() if child is head and head is not None]
    return (head, names[0]) if names else (None, "")


def _hooks(head: Any) -> Iterator[Any]:
    """Yield the hooks of a module."""
    for hooks in (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks):
        yield from hooks.values()


def _of_torch(hook: Any) -> bool:
    """Whether a hook is FSDP's, which does not look at what goes in and comes out."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _is_sharded(module: Any) -> bool:
    """Whether a module is a unit of FSDP1 or FSDP2 of its own."""
    return any(base.__module__.startswith("torch.distributed") for base in type(module).__mro__)


def _is_linear(head: Any) -> bool:
    """Whether a head computes with ``weight`` and ``bias`` alone."""
    return type(head).forward is nn.Linear.forward


def _tensors(head: Any) -> list[Tensor]:
    """Return all weights of a head; FSDP1 keeps them as plain attributes, not as parameters.

    Of a linear head these are ``weight`` and ``bias``, whatever else others keep there.
    """
    if _is_linear(head):
        return [head.weight] if head.bias is None else [head.weight, head.bias]
    held = [
        value
        for module in head.modules()
        for value in (*module._parameters.values(), *vars(module).values())
        if isinstance(value, Tensor)
    ]
    return list({id(tensor): tensor for tensor in held}.values())


class _Shadow:
    """Stands before a child of a model, with its attributes, and is called in its place."""

    def __init__(self, child: Any, call: Callable[..., Any]) -> None:
        self._child, self._call = child, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


class _Call:
    """One call of a model: its body runs once, its head as often as there are parts."""

    def __init__(self, model: Any, run: Callable[[], Any]) -> None:
        self._model, self._run = model, run
        self._body_name = model.base_model_prefix
        self._head, self._head_name = _head(model)
        self._body = getattr(model, self._body_name)
        self._outputs: Any = None

    def answer(self, asked: TokenQuestion, tokens: TokenLogprobs) -> dict[str, Tensor]:
        """Return what is asked, by its name in ``TokenAnswer``, with gradients to the model's weights."""
        found: list[dict[str, Tensor]] = []

        def body(*args: Any, **kwargs: Any) -> Any:
            self._outputs = self._body(*args, **kwargs)
            return self._outputs

        def head(hidden: Tensor) -> Tensor:
            # The head is called as a module: where FSDP shards it by itself, that gathers its weight meanwhile.
            self._head.__dict__["forward"] = lambda hidden: self._from(hidden, asked, tokens)
            try:
                found.append(self._head(hidden))
            finally:
                del self._head.__dict__["forward"]
            return hidden.new_empty((*hidden.shape[:-1], 0))  # no logits: what the model does to them costs nothing

        with self._shadowed(body, head):
            self._run()
        if len(found) != 1:
            raise HeadError(f"{type(self._model).__name__} calls its {self._head_name} {len(found)} times, not once")
        return found[0]

    def _from(self, hidden: Tensor, asked: TokenQuestion, tokens: TokenLogprobs) -> dict[str, Tensor]:
        if self._outputs is None:  # else what comes after the head could not run without what comes before
            raise HeadError(f"{type(self._model).__name__} calls only a part of its {self._body_name}")
        weights = _tensors(self._head)
        if any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
            raise HeadError(f"the weight of {self._head_name} is a part of a larger one ({type(weights[0]).__name__})")
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        transform, logits_type = self._transform(autocast or hidden.dtype, hidden.device)
        refuse_misfits(asked, torch.Size((*hidden.shape[:-1], self._head.out_features)), logits_type)
        scale = inverse(asked, hidden.shape[:-1], hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if asked.rows is not None:  # from here on the rows are those of the labels
            flat = flat.index_select(0, asked.rows)
            scale = None if scale is None else scale.index_select(0, asked.rows)
        kernels = tokens.kernels(flat.device, logits_type, asked)
        labels = asked.labels.reshape(-1).contiguous()
        work = _Work(self._head, transform, labels, scale, asked.entropy, asked.squares, kernels, autocast)
        found = TokenAnswer(*_FromHidden.apply(work, flat, *weights))._asdict()
        return {name: each.view(asked.labels.shape) for name, each in found.items() if each is not None}

    def _after_head(self, raw: Tensor) -> Any:
        """Return what the model makes of what its head gave."""
        with self._shadowed(lambda *args, **kwargs: self._outputs, lambda hidden: raw):
            return self._run().logits

    def _transform(self, dtype: torch.dtype, device: torch.device) -> tuple[Transform | None, torch.dtype]:
        """Return what the model does to a part of its logits, (tokens, columns), None if nothing; and their type then.

        ``dtype`` is that of what its head gives.

        Raises:
            HeadError: it does not do it element by element, or in place, where a gradient needs the logits.
        """
        probe = torch.linspace(-30, 30, 24, dtype=dtype, device=device).view(1, 4, 6)
        try:
            # In training as in backward, where what is done in place is an error.
            whole = self._after_head(probe.clone().requires_grad_(torch.is_grad_enabled())).detach()
            with torch.no_grad():
                part, _ = (self._after_head(each.clone()) for each in (probe[:, 1:3, 2:5], probe[..., :0]))
            apart = torch.equal(whole[:, 1:3, 2:5], part)
        except torch.OutOfMemoryError:  # says nothing of the model
            raise
        except Exception as error:  # whatever a model raises on logits of another size
            name = type(self._model).__name__
            raise HeadError(f"what {name} does to its logits cannot be done to a part of them: {error}") from error
        if not apart:
            raise HeadError(f"{type(self._model).__name__} does not change its logits element by element")
        if whole.dtype == probe.dtype and torch.equal(whole, probe):
            return None, dtype
        return lambda raw: self._after_head(raw.unsqueeze(0)).squeeze(0), whole.dtype

    @contextmanager
    def _shadowed(self, body: Callable[..., Any], head: Callable[..., Any]) -> Iterator[None]:
        """Have the model find these where it looks for its children; an attribute goes before a child."""
        own, names = self._model.__dict__, (self._body_name, self._head_name)
        before = {name: own[name] for name in names if name in own}
        own |= {self._body_name: _Shadow(self._body, body), self._head_name: _Shadow(self._head, head)}
        try:
            yield
        finally:
            for name in names:
                del own[name]
            own |= before


@dataclass
class _Work:
    """What the head's forward and backward need beside hidden states and weights."""

    head: Any
    transform: Transform | None
    labels: Tensor
    inverse: Tensor | None
    entropy: bool
    squares: bool
    kernels: Any
    autocast: torch.dtype | None

    def raw(self, states: Tensor) -> Tensor:
        """Return what the head gives for these hidden states."""
        found: Tensor = type(self.head).forward(self.head, states)
        return found

    def transformed(self, raw: Tensor) -> Tensor:
        return raw if self.transform is None else self.transform(raw)

    def running(self, device: str) -> Any:
        """Return the autocast in which the model ran, without its cache.

        That keeps a weight that was cast where no gradient was recorded, and gives it where one has to be.
        """
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False)


class _FromHidden(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, vocabulary = hidden.shape[0], work.head.out_features
        kept = empty_statistics(rows, torch.float32, hidden.device, work.entropy, work.squares)
        with work.running(hidden.device.type):
            for part in _slices(rows, AT_ONCE_FORWARD // vocabulary):
                logits = work.transformed(work.raw(hidden[part]))
                scale = None if work.inverse is None else work.inverse[part]
                work.kernels.forward(logits, work.labels[part], scale, kept.part(part))
                del logits  # else it is still there when the next ones are made
        ctx.save_for_backward(hidden, *weights, kept.normalizer, kept.entropy, kept.squares)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return kept.log_probs, kept.entropy, kept.squares

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, *weights, normalizer, entropy, squares = ctx.saved_tensors
        if all(each is None for each in upstream):
            return (None,) * len(ctx.needs_input_grad)
        work, states = ctx.work, hidden.detach()
        kept = Statistics(normalizer, normalizer, entropy, squares)
        above = Upstream(*(None if each is None else each.contiguous() for each in upstream))
        # What no loss uses, such as a prompt's tokens, has no gradient and is not computed again.
        used = torch.stack([each != 0 for each in above if each is not None]).any(0) | ~normalizer.isfinite()
        rows = used.nonzero().squeeze(-1)
        every = rows.numel() > WORTH * used.numel()
        if not every:
            states = states.index_select(0, rows)
            kept, above = kept.part(rows), above.part(rows)
            work = replace(work, labels=work.labels[rows], inverse=None if work.inverse is None else work.inverse[rows])
        backward = _columns_at_a_time if _is_linear(work.head) else _tokens_at_a_time
        with work.running(hidden.device.type):
            to_states, *to_weights = backward(work, states, weights, kept, above, ctx.needs_input_grad[2:])
        to_hidden = to_states if every else torch.zeros_like(hidden).index_copy_(0, rows, to_states)
        return None, to_hidden, *to_weights


def _columns_at_a_time(
    work: _Work, hidden: Tensor, weights: list[Tensor], kept: Statistics, above: Upstream, wanted: tuple[bool, ...]
) -> Iterator[Tensor | None]:
    """Yield the gradients of the hidden states, the weight and the bias of a linear head."""
    dtype = work.autocast or hidden.dtype
    states = hidden.detach().to(dtype)
    to_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    to_weights = [torch.empty_like(weight) if want else None for weight, want in zip(weights, wanted, strict=True)]
    for part in _slices(weights[0].shape[0], AT_ONCE // max(1, hidden.shape[0])):
        weight, *bias = (each.detach()[part].to(dtype) for each in weights)
        raw = nn.functional.linear(states, weight, *bias)
        with torch.enable_grad():
            logits = raw if work.transform is None else work.transform(raw.requires_grad_())
        gradient = _gradient(work, logits, work.labels - part.start, slice(None), kept, above)
        if logits is not raw:
            (gradient,) = torch.autograd.grad(logits, raw, gradient)
        _add_product(to_hidden, gradient, weight)
        for to, left in zip(to_weights, (states, None), strict=False):
            if to is None:
                continue
            if left is None:
                to[part] = gradient.sum(0)
            elif to.dtype == dtype:
                torch.mm(gradient.T, left, out=to[part])
            else:
                to[part] = gradient.T @ left
        del raw, logits, gradient  # else they are still there when the next ones are made
    yield to_hidden.to(hidden.dtype)
    yield from to_weights


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to an fp32 ``total``, in the product's own kernel where torch has one for these types."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


def _tokens_at_a_time(
    work: _Work, hidden: Tensor, weights: list[Tensor], kept: Statistics, above: Upstream, wanted: tuple[bool, ...]
) -> Iterator[Tensor | None]:
    """Yield the gradients of the hidden states and of all weights of a head of any kind."""
    # FSDP1 has made new views of the weights since; they lie where the saved ones do.
    current = [tensor for tensor, want in zip(_tensors(work.head), wanted, strict=True) if want]
    sums = [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in current]
    to_hidden = torch.empty_like(hidden)
    for part in _slices(hidden.shape[0], AT_ONCE // work.head.out_features):
        with torch.enable_grad():
            states = hidden[part].detach().requires_grad_()
            logits = work.transformed(work.raw(states))
        gradient = _gradient(work, logits, work.labels[part], part, kept, above, in_place=False)
        to_hidden[part], *more = torch.autograd.grad(logits, [states, *current], gradient)
        for total, each in zip(sums, more, strict=True):
            total += each
    yield to_hidden
    found = iter(sums)
    for weight, want in zip(weights, wanted, strict=True):
        yield next(found).to(weight.dtype) if want else None


def _gradient(
    work: _Work, logits: Tensor, labels: Tensor, rows: slice, kept: Statistics, above: Upstream, in_place: bool = True
) -> Tensor:
    """Return the gradient of these logits, written over them if nobody has saved them."""
    logits = logits.detach()
    target = logits if in_place and work.transform is None else torch.empty_like(logits)
    scale = None if work.inverse is None else work.inverse[rows]
    work.kernels.backward(logits, labels, scale, kept.part(rows), above.part(rows), target)
    return target


def _slices(count: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))
