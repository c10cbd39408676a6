"""LoRA adapters on their way from verl's FSDP engine to rollout: as they are, or merged (model.lora.merge=True)."""

from __future__ import annotations

import inspect
import re
from typing import Any

from verl_fl_overlay.errors import AdapterError
from verl_fl_overlay.hooks import Call, Hook
from verl_fl_overlay.kernels import fsdp1

MERGED = ".base_layer."
"""Part of a weight's name in PEFT's model if adapters are merged into it."""

HOLDERS = ("lora_A", "lora_embedding_A")
"""A module's children that hold its adapters, by their names; empty if it has none of that kind."""


def _names(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (params,) = (*args, *kwargs.values())
    return wrapped({name: tensor.clone() if MERGED in name else tensor for name, tensor in params.items()})


def _adapters(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    given.apply_defaults()
    told = given.arguments
    if told["state_dict"] is None:
        told["state_dict"] = told["model"].state_dict()
    name = re.compile(rf"((?:^|\.)lora_(?:embedding_)?[AB])\.{re.escape(told['adapter_name'])}(?=\.|$)")
    adapters = {name.sub(r"\1", key): weight for key, weight in told["state_dict"].items() if name.search(key)}
    return adapters | wrapped(*given.args, **given.kwargs)


def adapters_hook() -> Hook:
    """Return what every release needs where PEFT is."""
    return Hook(
        name="engine.adapters",
        module="peft.utils.save_and_load",
        attribute="get_peft_model_state_dict",
        wrapper=_adapters,
        feature="phase",
        required=False,
        why="PEFT 0.21 finds adapters by the names of modules, which FSDP1's wrappers and layered_summon change: "
        "it gives verl none of them.  Rollout then answers with the weights from before training, or vLLM 0.24 fails "
        "on the empty adapter and the run hangs.  They are found by their own names, too.",
        upstream="https://github.com/huggingface/peft/pull/3490",
        until="PEFT takes FSDP1's wrappers out of names everywhere, and names that begin inside of the model",
        needs="peft",
    )


def _all(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = wrapped(*args, **kwargs)
    (model,) = (*args, *kwargs.values())
    given = {_place(name.partition(".lora_")[0]) for name in found}
    own = {_place(name) for name, module in model.named_modules() if any(map(module._modules.get, HOLDERS))}
    if left := sorted(own - given):
        raise AdapterError(
            f"verl's layered_summon gives rollout the adapters of {len(given)} modules and leaves out those of "
            f"{len(left)} ({left[0]} ...): its answers would not be this model's. "
            "Set actor_rollout_ref.rollout.layered_summon=False, or name other target_modules"
        )
    return found


def _place(name: str) -> str:
    return name.replace(f"{fsdp1.HOLDS}.", "")


def layered_hook() -> Hook:
    """Return what every release needs."""
    return Hook(
        name="engine.layered_adapters",
        module="verl.utils.fsdp_utils",
        attribute="layered_summon_lora_params",
        wrapper=_all,
        feature="phase",
        required=False,
        why="With layered_summon verl collects the adapters in modules that are sharded one by one, before 0.9 only at "
        "the places of a language model: the others stay in rollout as they were before training.  That is an error.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/fsdp_utils.py#L645",
        until="verl collects the adapters of the root module and of vision towers",
    )


def _everywhere(wrapped: Call, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from verl.utils.fsdp_utils import _merge_or_unmerge_lora_

    module, merge = (*args, *kwargs.values())
    if merge:
        _refuse_tied(module)
    wrapped(*args, **kwargs)
    _merge_or_unmerge_lora_(module, merge=merge)  # leaves alone what is merged, or taken out, already


def _refuse_tied(model: Any) -> None:
    """Refuse an adapter on embeddings whose weight is the head's too, unless the head has one as well.

    Training's head is without it; merged into the weight, it is in rollout's head.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings, head = (any(getattr(end, holder, None) for holder in HOLDERS) for end in ends)
    if embeddings and not head:
        raise AdapterError(
            "the model's head shares the weight of its embeddings, and an adapter is on the embeddings alone: merged "
            "into that weight (model.lora.merge=True) it would change rollout's head, and training's has none. Leave "
            "the embeddings out of target_modules, or set model.lora.merge=False"
        )


def everywhere_hook() -> Hook:
    """Return the hook on the merging, from verl 0.7.1 on."""
    return Hook(
        name="engine.merged_everywhere",
        module="verl.utils.fsdp_utils",
        attribute="fsdp_merge_unmerge",
        wrapper=_everywhere,
        feature="phase",
        required=False,
        why="With FSDP2 verl merges adapters in the modules that are sharded one by one, and not in those that belong "
        "to the root, such as what joins a vision tower to a language model: rollout gets their weights from before "
        "training.  The rest is merged too.  An adapter on embeddings that share the head's weight is an error.",
        upstream="https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/fsdp_utils.py#L909",
        until="verl merges the adapters of FSDP2's root module",
        relies_on=("verl.utils.fsdp_utils:_merge_or_unmerge_lora_",),
    )


def weights_hook() -> Hook:
    """Return the hook on the names of the merged weights, which verl before 0.9 asks for while they are merged.

    It copies those weights of this rank's shard, on the device where they are.
    """
    return Hook(
        name="engine.merged_adapters",
        module="verl.workers.engine.fsdp.transformer_impl",
        attribute="normalize_peft_param_name",
        wrapper=_names,
        feature="phase",
        required=True,
        why="verl takes merged weights without a copy, and takes the adapters out again before it sends them: rollout "
        "gets the weights from before training.  A copy keeps what was merged.",
        upstream="https://github.com/volcengine/verl/blob/v0.8.0/verl/workers/engine/fsdp/transformer_impl.py#L820",
        until="verl 0.9.0, which sends the weights while they are merged",
    )
