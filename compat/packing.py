"""Where verl's FSDP engines and legacy workers run a model on packed sequences.

The sequences' lengths are known here, before the first layer.  They go to the model with its inputs; else transformers
derives them from the positions in each layer, forward and again in the recomputation, and waits for the device.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from verl_fl_overlay.compat import transformers_attention
from verl_fl_overlay.errors import OverlayError, PackingError
from verl_fl_overlay.events import failures, packed_model
from verl_fl_overlay.hooks import Call, Hook, Wrapper
from verl_fl_overlay.kernels.sequences import PackedModel

T = TypeVar("T")

ENGINE = "verl.workers.engine.fsdp.transformer_impl"
OWNER = "FSDPEngineWithLMHead"
LENGTHS = "the lengths of packed sequences"
PATCH = "verl.models.transformers.monkey_patch"
SOURCE = "https://github.com/volcengine/verl/blob"
QWEN_2 = {
    "transformers.models.qwen2_vl.modeling_qwen2_vl": "Qwen2VLAttention",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": "Qwen2_5_VLAttention",
}
GLM_4 = {"transformers.models.glm4v.modeling_glm4v": "Glm4vTextAttention"}
NATIVE = {"qwen2_vl": QWEN_2, "qwen2_5_vl": QWEN_2, "glm4v": GLM_4}
"""Type of a vision-language model -> the modules and classes of attention whose forward verl replaces for it."""

VERLS_OWN = {*NATIVE, "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}
"""Types of models with towers whose forward verl replaces: it gives lengths to the text model alone."""
ITS_ATTENTION = "transformers:PretrainedConfig._attn_implementation"
"""What ``attention_of`` reads; it asks for ``get_text_config`` too, and goes without it."""
OF_A_PLACE = (
    "verl.utils.ulysses:get_ulysses_sequence_parallel_rank",
    "verl.utils.device:get_device_name",
    "transformers:PreTrainedModel",
    ITS_ATTENTION,
    *(
        f"{transformers_attention.FUNCTIONS}:FlashAttentionKwargs.{name}"
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ),
)
"""What a ``Place`` uses beside its owner's attributes: of verl, of transformers, and the names of the lengths there."""


@dataclass(frozen=True)
class Place:
    """Who runs a model: the module that is called, and the group of ranks that shares its sequences (Ulysses)."""

    module: Any
    ranks: int
    rank: int
    autocast: Callable[[], Any]

    @property
    def model(self) -> Any:
        """transformers' model in ``module``, which FSDP, PEFT or trl may have wrapped; None if there is none."""
        from transformers import PreTrainedModel

        return next((module for module in self.module.modules() if isinstance(module, PreTrainedModel)), None)

    def lengths(self, ends: Any, longest: int) -> dict[str, Any]:
        """Return the model's inputs that hold the cumulative lengths, int32 on its device; none if it takes none.

        transformers' own forwards of models with a tower give that the lengths too, beside its own ones.
        """
        config, flash = self.model.config, attention_of(self.model).startswith("flash")
        towers = hasattr(config, "vision_config") or hasattr(config, "audio_config")
        parameters = inspect.signature(self.model.forward).parameters.values()
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if not flash or not takes_more or (towers and config.model_type not in VERLS_OWN):
            return {}
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def try_on(self, inputs: Mapping[str, Any]) -> None:
        """Let the model be tried on a few tokens, in eval mode and otherwise as with ``inputs``, which verl gives it.

        Raises:
            PackingError: it does not keep packed sequences apart.
        """
        model, positions = self.model, inputs["position_ids"]
        whole = hasattr(model.config, "vision_config")  # verl cuts these models' inputs after the embedding

        def forward(ids: Any, ends: tuple[int, ...]) -> Any:
            import torch

            cuts = [torch.arange(end - first) for first, end in pairwise(ends)]
            position_ids = torch.cat(cuts).to(positions).expand(*positions.shape[:-1], ends[-1])
            cumulative = torch.tensor(ends, device=ids.device)
            size = ends[-1] // self.ranks
            here = slice(self.rank * size, (self.rank + 1) * size)
            part = slice(None) if whole else here
            given = {"input_ids": ids[:, part], "position_ids": position_ids[..., part]}
            given |= self.lengths(cumulative.int(), max(map(len, cuts)))
            if "cu_seqlens" in inputs:
                given |= {"cu_seqlens": cumulative, "cu_seqlens_cpu": cumulative.cpu()}
            if "temperature" in inputs:  # verl's fused head gives log-probs and no logits
                given |= {"temperature": 1.0, "return_dict": True}
            if "shift_labels" in inputs:
                given |= {"shift_labels": ids.roll(-1, 1)[:, here]}
            with _evaluating(self.module), self.autocast():
                output = self.module(**given, attention_mask=None, use_cache=False)
            if "temperature" in inputs:
                return output.log_probs.unsqueeze(-1)
            return output[2].unsqueeze(-1) if hasattr(self.module, "v_head") else output.logits

        told = bool(self.lengths(None, 0))
        description = model.config, positions.device, forward, attention_of(model), told, self.rank, self.ranks
        packed_model.ask(PackedModel(model, *description))


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Have ``module`` in eval mode, and each part of it in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def first(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call, which may be given by its name."""
    return kwargs[name] if name in kwargs else args[0]


def attention_of(model: Any) -> str:
    """Return the name of the attention of ``model``'s text layers."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return str(getattr(config, "_attn_implementation", None))


def engine_hooks() -> list[Hook]:
    """Return the hooks on verl's FSDP engine.  The hook on one of its methods tells the other the lengths."""
    on_host: ContextVar[list[int]] = ContextVar("lengths of the micro-batch", default=[])  # noqa: B039  nobody adds

    def forward_step(wrapped: Call, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = first("micro_batch", args, kwargs)["input_ids"]
        token = on_host.set(ids.offsets().diff().tolist() if ids.is_nested else [])
        try:
            return wrapped(*args, **kwargs)
        finally:
            on_host.reset(token)

    def inputs(wrapped: Call, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, about = wrapped(*args, **kwargs)
        ids = first("micro_batch", args, kwargs)["input_ids"]
        if given.get("attention_mask") is not None or not ids.is_nested:
            return given, about

        def lengths_of(place: Place) -> dict[str, Any]:
            tokens, lengths = ids.values().shape[0], on_host.get()
            if len(lengths) != ids.shape[0] or sum(lengths) != tokens:  # those of another batch
                lengths = ids.offsets().diff().tolist()
            if not tokens or place.model is None or sum(lengths) != tokens:
                return {}
            place.try_on(given)
            padding, ends = int(about.get("pad_size", 0)), ids.offsets().int()
            ends = _with(ends, tokens + padding) if padding else ends
            return place.lengths(ends, max(*lengths, padding)) if is_own(engine) else {}

        return {**given, **(or_none(LENGTHS, lambda: lengths_of(place_of(engine))) or {})}, about

    hook = partial(Hook, module=ENGINE, feature="attention", required=False)
    return [
        hook(
            name="attention.lengths",
            attribute=f"{OWNER}.prepare_model_inputs",
            wrapper=inputs,
            why="verl gives the model packed sequences and no lengths, so each layer derives them and waits; they are "
            "given once, and a model that mixes the sequences is refused.",
            upstream=f"{SOURCE}/v0.9.1/{ENGINE.replace('.', '/')}.py#L1145",
            until="verl gives cu_seq_lens_q and max_length_q to the model",
            relies_on=(
                *(f"{ENGINE}:{OWNER}.{name}" for name in ("module", "ulysses_sequence_parallel_size")),
                *OF_A_PLACE,
            ),
        ),
        hook(
            name="attention.lengths_on_host",
            attribute=f"{OWNER}.forward_step",
            wrapper=forward_step,
            why="verl moves a micro-batch to the device here; its lengths are read before, where nothing has to wait.",
            upstream=f"{SOURCE}/v0.9.1/{ENGINE.replace('.', '/')}.py#L1549",
            until="verl gives cu_seq_lens_q and max_length_q to the model",
        ),
    ]


def or_none(what: str, find: Callable[[], T]) -> T | None:
    """Return what is found; None if a changed verl, or an unusual model, does not tell it, which is recorded.

    Raises:
        OverlayError: the overlay itself refuses; its text says what.
    """
    try:
        return find()
    except OverlayError:
        raise
    except Exception as error:
        failures.record(what, error)
        return None


def is_own(engine: Any, method: str = "prepare_model_inputs") -> bool:
    """Whether this method of the engine is FSDP's own; VeOmni changes the inputs, and gives lengths itself."""
    return next(cls for cls in type(engine).__mro__ if method in vars(cls)).__name__ == OWNER


def place_of(engine: Any) -> Place:
    """Return where an initialised engine runs its model."""
    return Place(engine.module, *_ulysses(engine), partial(_autocast, getattr(engine, "_autocast_dtype", None)))


def _ulysses(owner: Any) -> tuple[int, int]:
    """Return how many ranks share a sequence, and which of them this is."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_rank

    ranks = int(owner.ulysses_sequence_parallel_size)
    return ranks, get_ulysses_sequence_parallel_rank() if ranks > 1 else 0


def _autocast(dtype: Any) -> Any:
    """Return the autocast in which verl runs the model: bf16 where it does not say, none for fp32."""
    import torch
    from verl.utils.device import get_device_name

    dtype = torch.bfloat16 if dtype is None else dtype
    return torch.autocast(get_device_name(), dtype=dtype, enabled=dtype != torch.float32)


def _with(ends: Any, last: int) -> Any:
    import torch

    return torch.cat([ends, ends.new_tensor([last])])


def _worker(module: str) -> Wrapper:
    """Return the wrapper of a legacy worker's pass over a micro-batch; ``module`` is its attribute for the model."""

    def forward(wrapped: Call, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = first("micro_batch", args, kwargs)
        lengths = batch["attention_mask"].sum(-1).tolist() if worker.use_remove_padding else []
        if not sum(lengths):
            return wrapped(*args, **kwargs)

        def lengths_of(place: Place) -> dict[str, Any]:
            if place.model is None:
                return {}
            positions = batch["position_ids"][:1, ..., :1]  # (1, 1), for a vision-language model (1, rows, 1)
            fused = {"temperature": 1.0} if getattr(worker, "use_fused_kernels", False) else {}
            place.try_on({"position_ids": positions.transpose(0, 1) if positions.dim() == 3 else positions, **fused})
            padding = -sum(lengths) % place.ranks
            ends = batch["attention_mask"].new_tensor([0, *accumulate(lengths)]).int()
            ends = _with(ends, sum(lengths) + padding) if padding else ends
            return place.lengths(ends, max(*lengths, padding))

        model = getattr(worker, module)
        autocast = partial(_autocast, getattr(worker, "param_dtype", None))
        found = or_none(LENGTHS, lambda: lengths_of(Place(model, *_ulysses(worker), autocast)))
        with _given(model, found or {}):
            return wrapped(*args, **kwargs)

    return forward


@contextmanager
def _given(module: Any, more: dict[str, Any]) -> Iterator[None]:
    """Give ``module`` these inputs in addition to those that it is called with."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def worker_hooks() -> list[Hook]:
    """Return the hooks on the legacy workers of verl 0.7.

    What only the actor has is asked for with a default: the critic computes in bf16 and has no fused kernels.
    """
    hook = partial(Hook, feature="attention", required=False, until="verl 0.8.0, which has no legacy workers")
    actors = ("use_fused_kernels", "param_dtype")
    classes = {
        "actor": ("actor.dp_actor", "DataParallelPPOActor", "actor_module", actors),
        "critic": ("critic.dp_critic", "DataParallelPPOCritic", "critic_module", ()),
    }
    return [
        hook(
            name=f"attention.lengths_{name}",
            module=f"verl.workers.{path}",
            attribute=f"{owner}._forward_micro_batch",
            wrapper=_worker(module),
            why="as attention.lengths, in verl 0.7's default workers.",
            upstream=f"{SOURCE}/v0.7.1/verl/workers/{path.replace('.', '/')}.py",
            relies_on=(
                *(
                    f"verl.workers.{path}:{owner}.{attribute}"
                    for attribute in (module, "use_remove_padding", "ulysses_sequence_parallel_size", *own)
                ),
                *OF_A_PLACE,
            ),
        )
        for name, (path, owner, module, own) in classes.items()
    ]


def _patch(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = first("model", args, kwargs)
    ranks = kwargs.get("ulysses_sp_size", args[1] if len(args) > 1 else 1)
    if ranks > 1 and "flash" not in (attention := attention_of(model)):
        raise PackingError(
            f"ulysses_sequence_parallel_size={ranks} with attn_implementation={attention} computes wrong numbers for "
            f"{type(model).__name__}: each rank attends to its own part of a sequence alone, since verl exchanges "
            f"heads only in {transformers_attention.NAME}. Take that, which needs no flash-attn with this overlay, or "
            "set ulysses_sequence_parallel_size=1"
        )
    with _attention_stays(model.config.model_type):
        return wrapped(*args, **kwargs)


@contextmanager
def _attention_stays(model_type: str) -> Iterator[None]:
    """Put the attention of a vision-language model back, whatever verl put in its place."""
    from verl.utils.device import get_device_name

    if model_type not in NATIVE or get_device_name() == "npu":  # there verl's takes torch_npu's functions
        yield
        return
    classes = [getattr(importlib.import_module(module), name) for module, name in NATIVE[model_type].items()]
    forwards = [attention.forward for attention in classes]
    try:
        yield
    finally:
        for attention, forward in zip(classes, forwards, strict=True):
            attention.forward = forward


def _exchange(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size

    # On more ranks verl takes positions as the sign that there is something to exchange.
    if kwargs.get("cu_seq_lens_q") is not None and get_ulysses_sequence_parallel_world_size() == 1:
        kwargs = {**kwargs, "position_ids": None}
    return wrapped(*args, **kwargs)


def _visual(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    visual = first("model", args, kwargs).visual
    handle = visual.register_forward_hook(lambda _, __, output: getattr(output, "pooler_output", output))
    try:
        return wrapped(*args, **kwargs)
    finally:
        handle.remove()


def model_hooks() -> list[Hook]:
    """Return the hooks on verl's changes to a model's classes, and on what it runs of a vision-language model."""
    hook = partial(Hook, feature="attention", required=False)
    visual = [
        hook(
            name=f"attention.visual_{name}",
            module=f"verl.models.transformers.{name}",
            attribute="_get_input_embeds",
            wrapper=_visual,
            why="for a batch without images verl runs the vision tower on an empty one and takes its output for a "
            "tensor, which in transformers 5 it is not; it gets the tensor in it.",
            upstream=f"{SOURCE}/v0.9.1/verl/models/transformers/{name}.py",
            until="verl unpacks this output as it unpacks that of real images",
        )
        for name in ("qwen2_vl", "glm4v")
    ]
    exchange = hook(
        name="attention.positions",
        module=PATCH,
        attribute="_ulysses_flash_attention_forward",
        wrapper=_exchange,
        why="in each layer transformers looks whether the positions are those of packed sequences, although it has "
        "their lengths; then it gets no positions.",
        upstream=f"{SOURCE}/v0.9.1/{PATCH.replace('.', '/')}.py#L89",
        until="transformers does not look at positions where it has lengths",
        relies_on=("verl.utils.ulysses:get_ulysses_sequence_parallel_world_size",),
    )
    patch = hook(
        name="attention.patch",
        module=PATCH,
        attribute="apply_monkey_patch",
        wrapper=_patch,
        why="verl's attention for vision-language models needs flash-attn and waits for the device in each layer, and "
        "transformers' own does what it is for; Ulysses without flash_attention_2 gives wrong numbers and is refused.",
        upstream=f"{SOURCE}/v0.9.1/{PATCH.replace('.', '/')}.py#L294",
        until="verl leaves these models' attention alone, and refuses Ulysses with other attention",
        relies_on=(
            "verl.utils.device:get_device_name",
            "transformers:PretrainedConfig.model_type",
            ITS_ATTENTION,
            *(f"{module}:{name}" for classes in (QWEN_2, GLM_4) for module, name in classes.items()),
        ),
    )
    return [*visual, exchange, patch]
