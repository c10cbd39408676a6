"""The trial: one step of verl's real FSDP2 engine on a model.  ``parity``, ``tune`` and ``warmup`` run it.

It is run by path in its own process and does not import the overlay: the environment decides whether verl loads it.
python trial.py MODEL RESULT.pt --rows 4 --length 256 --micro-batch 2 --seed 0 --attention flash_attention_2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from dataclasses import dataclass, fields
from typing import Any

RELIES_ON = tuple(
    f"verl.{owner}{name}"
    for owner, names in {
        "trainer.config:": "CheckpointConfig",
        "utils.dataset.dataset_utils:": "DatasetPadMode.NO_PADDING",
        "utils.device:": "get_device_name",
        "utils.distributed:": "initialize_global_process_group",
        "utils.tensordict_utils:": "get_tensordict",
        "workers.config:FSDPEngineConfig.": "strategy use_torch_compile use_dynamic_bsz "
        "micro_batch_size_per_gpu mixed_precision",
        "workers.config:FSDPOptimizerConfig.": "lr weight_decay clip_grad total_training_steps lr_warmup_steps "
        "lr_warmup_steps_ratio",
        "workers.config:HFModelConfig.": "path use_remove_padding enable_gradient_checkpointing override_config",
        "workers.engine:": "EngineRegistry.new",
        "workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.": "__init__ initialize module eval_mode "
        "infer_batch train_mode train_batch",
        "workers.utils.losses:": "sft_loss",
    }.items()
    for name in names.split()
)
"""Everything of verl that the trial uses, as ``module:attribute``: pinned, and compared by ``verl-fl check``."""


@dataclass(frozen=True)
class Trial:
    """What is run: a model's folder, and a batch of ``rows`` sequences of at most ``length`` tokens.

    ``padding`` is use_remove_padding=False.  ``fp32`` computes in fp32, as a reference, whatever verl computes in.
    """

    model: str
    rows: int = 4
    length: int = 256
    micro_batch: int = 2
    seed: int = 0
    attention: str = "flash_attention_2"
    padding: bool = False
    fp32: bool = False


def join_group() -> None:
    """Initialise the process group of this one process, by verl's own function."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    from verl.utils.distributed import initialize_global_process_group

    initialize_global_process_group()


def build(trial: Trial) -> Any:
    """Construct and initialise ``FSDPEngineWithLMHead`` (fsdp2) on the model, as verl configures it by default."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model_config = HFModelConfig(
        path=trial.model,
        use_remove_padding=not trial.padding,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": trial.attention},
    )
    model_config.model_type = "language_model"
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32") if trial.fp32 else None
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model_config,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=trial.micro_batch,
            mixed_precision=precision,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=1e-6,
            weight_decay=0.0,
            clip_grad=1e9,  # the gradients are read after the optimizer has clipped them
            total_training_steps=100,
            lr_warmup_steps=0,
            lr_warmup_steps_ratio=0.0,
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def batch(config: Any, trial: Trial) -> Any:
    """Return sequences of half the length to the length, of random tokens; half of each sequence is a prompt.

    ``config`` is the model's configuration.  A vision-language model gets text alone, with positions of four rows
    where its rotary embedding has three axes.
    """
    import torch
    from verl.utils import tensordict_utils
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    text = config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    words = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    rotary = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    rows = (4,) if "mrope_section" in rotary else ()
    generator = torch.Generator().manual_seed(trial.seed)
    lengths = [max(2, trial.length - row * trial.length // (2 * trial.rows)) for row in range(trial.rows)]

    def nested(of_length: Any) -> Any:
        return torch.nested.as_nested_tensor([of_length(each) for each in lengths], layout=torch.jagged)

    return tensordict_utils.get_tensordict(
        tensor_dict={
            "input_ids": nested(lambda n: words[torch.randint(0, len(words), (n,), generator=generator)]),
            "loss_mask": nested(lambda n: (torch.arange(n) >= n // 2).long()),
            "position_ids": nested(lambda n: torch.arange(n).expand(*rows, n).clone()),
        },
        non_tensor_dict={
            "use_remove_padding": not trial.padding,
            "calculate_entropy": True,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": trial.micro_batch,
            "temperature": 1.0,
            "global_batch_size": trial.rows,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
        },
    )


def run(trial: Trial) -> dict[str, Any]:
    """Compute log-probs and entropy, then loss and gradients of one training step, on the same batch and weights."""
    from functools import partial

    import torch
    from verl.utils.device import get_device_name
    from verl.workers.utils.losses import sft_loss

    if trial.fp32:  # before 0.7.1 verl computes in bf16 whatever is configured
        torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
    torch.manual_seed(trial.seed)
    engine = build(trial)
    data = batch(engine.module.config, trial)
    data = data.to(get_device_name())
    with engine.eval_mode():
        output = engine.infer_batch(data, loss_function=None)["model_output"]
    log_probs, entropy = (_inside(output[name]) for name in ("log_probs", "entropy"))
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=partial(sft_loss, config=None))
        norms = {name: _norm(parameter.grad) for name, parameter in engine.module.named_parameters()}
    activation = sys.modules.get("verl_fl_overlay.activation")  # there only if verl loaded the overlay
    overlay = activation.report() if activation else None
    return {
        "log_probs": log_probs,
        "entropy": entropy,
        "loss": float(sum(output["loss"])),
        "grad_norm": float(output["metrics"]["grad_norm"]),
        "grad_norms": norms,
        "tokens": sum(data["input_ids"].offsets().diff().tolist()),
        "overlay": json.loads(json.dumps(overlay)),
    }


def _inside(values: Any) -> Any:
    """Return one number for each token that has a next one; the last one's depends on what lies behind its row."""
    import torch

    return torch.cat([row[:-1] for row in values.unbind()]).float().cpu()


def _norm(gradient: Any) -> float:
    """Return the 2-norm of a parameter's gradient, 0 if it has none."""
    if gradient is None:
        return 0.0
    return float(getattr(gradient, "to_local", lambda: gradient)().double().norm())


def steps(trial: Trial) -> Any:
    """Build the engine in this process; return a function that runs one training step of it."""
    from functools import partial

    import torch
    import verl  # noqa: F401
    from verl.utils.device import get_device_name
    from verl.workers.utils.losses import sft_loss

    if not torch.distributed.is_initialized():
        join_group()
    engine = build(trial)
    data = batch(engine.module.config, trial).to(get_device_name())

    def step() -> None:
        with engine.train_mode():
            engine.train_batch(data, loss_function=partial(sft_loss, config=None))

    return step


def main() -> None:
    """Run the trial that the command line describes and save what it computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("result")
    for field in fields(Trial)[1:]:
        name, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(name, default=field.default, type=(lambda text: text == "True") if kind is bool else kind)
    options = vars(parser.parse_args())
    result = options.pop("result")
    import torch
    import verl  # noqa: F401

    join_group()
    torch.save(run(Trial(**options)), result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
