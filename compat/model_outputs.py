"""Where verl's engines run a model and turn what it computed into the log-probs and the entropy of each token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from verl_fl_overlay.compat import packing
from verl_fl_overlay.compat.packing import SOURCE
from verl_fl_overlay.compat.token_logprobs import idle, verl_has_a_kernel
from verl_fl_overlay.events import head, token_logprobs
from verl_fl_overlay.hooks import Call, Hook
from verl_fl_overlay.kernels.tokens import HEAD, Sealed, TokenAnswer, TokenQuestion

ENGINES = {
    "fsdp": ("FSDPEngineWithLMHead", ""),
    "automodel": ("AutomodelEngineWithLMHead", "nemo_automodel"),
    "torchtitan": ("TorchTitanEngineWithLMHead", "torchtitan"),
}
"""verl's folder -> the class whose ``prepare_model_outputs`` this is, the package that its module needs."""

NEED_LOGITS = ("use_fused_kernels", "distillation_use_topk", "distillation_only")
"""verl's flags of a micro-batch with which there are no logits, or which read all of them."""

WANTED = "log-probs and entropy of a micro-batch"
TENSORDICT = "verl.utils.tensordict_utils"


class _Call(NamedTuple):
    """The arguments of verl's method; TorchTitan's engine calls the first one ``logits``."""

    output: Any
    output_args: Any
    micro_batch: Any
    logits_processor_func: Any = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        return cls(*args, **{"output" if name == "logits" else name: value for name, value in kwargs.items()})


def _outputs(wrapped: Call, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give verl the log-probs and the entropy, and let it lay them out as it does with those of its fused head."""
    from verl.utils import tensordict_utils

    call = _Call.of(args, kwargs)
    if type(call.output) is dict:  # the model was asked and has answered
        found: TokenAnswer | None = TokenAnswer(**call.output)
    else:
        found = _answer(engine, getattr(call.output, "logits", call.output), call)
    if found is None:
        return wrapped(*args, **kwargs)
    batch = call.micro_batch.copy()
    # A padded batch becomes a packed one: only its tokens were asked for, and they are in that order.
    flags = {"use_fused_kernels": True, "use_remove_padding": True, "calculate_sum_pi_squared": False}
    tensordict_utils.assign_non_tensor(batch, **flags)
    more = {"temperature_rmpad": None, "pad_size": 0, **call.output_args}

    def laid_out(log_probs: Any, entropy: Any) -> Any:
        # Some releases read the entropy also where nobody asks for it.
        rows = {"log_probs": log_probs, "entropy": log_probs if entropy is None else entropy}
        output = SimpleNamespace(**{name: values.unsqueeze(0) for name, values in rows.items()})
        given = {**call._asdict(), "output": output, "output_args": more, "micro_batch": batch}
        return wrapped(**{name: given[name] for name in (*_Call._fields[: len(args)], *kwargs)})

    outputs = laid_out(found.log_probs, found.entropy)
    if found.squares is not None:
        outputs["sum_pi_squared"] = laid_out(found.squares, None)["log_probs"]
    return outputs


def _torchtitan_outputs(wrapped: Call, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lay the log-probs and the entropy out as verl does; this engine has no fused head."""
    import torch

    call = _Call.of(args, kwargs)
    found = _answer(engine, call.output, call)
    if found is None:
        return wrapped(*args, **kwargs)
    ends = call.micro_batch["input_ids"].offsets()
    named = {"log_probs": found.log_probs, "entropy": found.entropy}
    return {
        name: torch.nested.nested_tensor_from_jagged(values, ends)
        for name, values in named.items()
        if values is not None
    }


def _answer(engine: Any, logits: Any, call: _Call) -> TokenAnswer | None:
    """Return what verl wants to know of the tokens; None where verl computes it, or if a changed verl does not tell.

    Raises:
        OverlayError: logits and labels do not belong together.
    """
    from torch import Tensor

    if type(logits) is not Tensor:  # verl gathers a DTensor
        return None
    told = call.output_args
    asked = (
        told[HEAD]
        if HEAD in told
        else packing.or_none(WANTED, lambda: question(engine, told, call.micro_batch, logits.shape[1]))
    )
    if asked is None:
        return None
    return token_logprobs.ask(replace(asked, logits=logits if asked.rows is not None else logits.squeeze(0)))


def question(engine: Any, told: Any, batch: Any, length: int) -> TokenQuestion | None:
    """Return what verl wants to know of the tokens of a micro-batch, without logits; None if it needs all of these.

    ``told`` is what verl keeps for the outputs, ``length`` the number of tokens in a row of the model's inputs.
    """
    from torch import Tensor
    from verl.utils.tensordict_utils import get_non_tensor_data

    flag = partial(get_non_tensor_data, batch, default=False)
    if any(flag(key=name) for name in NEED_LOGITS):
        return None
    entropy = bool(flag(key="calculate_entropy"))
    labels = (told["labels"] if "labels" in told else told["input_ids_rmpad_rolled"]).reshape(-1)
    packed = get_non_tensor_data(batch, key="use_remove_padding", default=True)
    temperature = told.get("temperature_rmpad" if packed else "temperature", batch["temperature"])
    if isinstance(temperature, Tensor) and not packed:
        temperature = temperature.view(-1, 1)
    return TokenQuestion(
        None,
        labels,
        None if told.get("temperature_is_one") else temperature,
        None if packed else _rows(batch["input_ids"], length, labels.numel()),
        entropy,
        bool(flag(key="calculate_sum_pi_squared")),
        in_place=True,  # nobody but this computation reads the logits
        verl_computes=verl_has_a_kernel,
        idle=idle(engine.engine_config) if entropy else (),
    )


def _inputs(wrapped: Call, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the model the question that verl will ask of its logits, if it is to answer without making them.

    The question is kept for ``_outputs``, which asks it of the logits otherwise.
    """
    given, told = wrapped(*args, **kwargs)
    if not (packing.is_own(engine) and packing.is_own(engine, "prepare_model_outputs")):
        return given, told
    batch, (rows, length) = packing.first("micro_batch", args, kwargs), given["input_ids"].shape
    asked = packing.or_none(WANTED, lambda: question(engine, told, batch, length))
    told = {**told, HEAD: asked}
    model = packing.place_of(engine).model
    computes_in = getattr(engine, "_autocast_dtype", None)  # verl computes in bf16 where it does not say
    size = 2 if computes_in is None else computes_in.itemsize
    rows *= length
    if asked is None or model is None or not packing.or_none(WANTED, lambda: head.ask(model, asked, rows, size)):
        return given, told
    return {**given, HEAD: Sealed(asked)}, told


def _rows(ids: Any, length: int, tokens: int) -> Any:
    """Return where the tokens of nested ``ids`` are in a batch that is padded on the right to ``length``, (tokens,)."""
    import torch

    ends = ids.offsets()
    before = torch.arange(ids.shape[0], device=ends.device) * length - ends[:-1]
    return torch.repeat_interleave(before, ends.diff(), output_size=tokens) + torch.arange(tokens, device=ends.device)


def inputs_hook() -> Hook:
    """Return the hook on the inputs of verl's FSDP engine."""
    module, owner = packing.ENGINE, packing.OWNER
    return Hook(
        name="head.inputs",
        module=module,
        attribute=f"{owner}.prepare_model_inputs",
        wrapper=_inputs,
        feature="head",
        required=False,
        why="verl makes the logits of all tokens, and keeps of each row a number or two; where they do not fit, the "
        "model is asked for these numbers, and makes a part of its logits at a time.",
        upstream=f"{SOURCE}/v0.9.1/{module.replace('.', '/')}.py#L1145",
        until="verl's use_fused_kernels works with every head and keeps what a model does to its logits",
        relies_on=(
            f"{module}:{owner}.module",
            f"{module}:{owner}.engine_config",
            f"{module}:{owner}.prepare_model_outputs",
            f"{TENSORDICT}:get_non_tensor_data",
        ),
    )


def outputs_hook(name: str) -> Hook:
    """Return the hook on the engine of verl's folder ``name`` (a key of ``ENGINES``)."""
    owner, needs = ENGINES[name]
    module = f"verl.workers.engine.{name}.transformer_impl"
    return Hook(
        name=f"entropy.{name}",
        module=module,
        attribute=f"{owner}.prepare_model_outputs",
        wrapper=_torchtitan_outputs if name == "torchtitan" else _outputs,
        feature="logprobs",
        required=False,
        why="verl divides the logits by the temperature, computes log-probs, and then the entropy with several copies "
        "of the logits; all of it comes from one pass, without a copy.",
        upstream=f"{SOURCE}/v0.9.1/{module.replace('.', '/')}.py",
        until="verl computes log-probs and entropy in one pass",
        needs=needs,
        relies_on=(
            f"{module}:{owner}.engine_config",
            f"{TENSORDICT}:get_non_tensor_data",
            f"{TENSORDICT}:assign_non_tensor",
        ),
    )
