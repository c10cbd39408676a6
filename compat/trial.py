"""The trial: one step of verl's real FSDP2 engine on a model.  ``parity``, ``tune`` and ``warmup`` run it.

It is run by path in its own process and does not import the overlay: the environment decides whether verl loads it.
python trial.py MODEL RESULT.pt --rows 4 --length 256 --micro-batch 2 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from typing import Any

RELIES_ON = tuple(
    f"verl.{owner}{name}"
    for owner, names in {
        "trainer.config:": "CheckpointConfig",
        "utils.dataset.dataset_utils:": "DatasetPadMode.NO_PADDING",
        "utils.device:": "get_device_name",
        "utils.distributed:": "initialize_global_process_group",
        "utils.tensordict_utils:": "get_tensordict",
        "workers.config:FSDPEngineConfig.": "strategy use_torch_compile use_dynamic_bsz micro_batch_size_per_gpu",
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


def join_group() -> None:
    """Initialise the process group of this one process, by verl's own function."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    from verl.utils.distributed import initialize_global_process_group

    initialize_global_process_group()


def build(model: str, micro_batch: int) -> Any:
    """Construct and initialise ``FSDPEngineWithLMHead`` (fsdp2) on the model in the folder ``model``."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model_config = HFModelConfig(
        path=model,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    model_config.model_type = "language_model"
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model_config,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch
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


def batch(vocabulary: int, rows: int, length: int, micro_batch: int, seed: int) -> Any:
    """Return ``rows`` sequences of ``length`` / 2 to ``length`` random tokens; half of each sequence is a prompt."""
    import torch
    from verl.utils import tensordict_utils
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    generator = torch.Generator().manual_seed(seed)
    lengths = [max(2, length - row * length // (2 * rows)) for row in range(rows)]

    def nested(of_length: Any) -> Any:
        return torch.nested.as_nested_tensor([of_length(each) for each in lengths], layout=torch.jagged)

    return tensordict_utils.get_tensordict(
        tensor_dict={
            "input_ids": nested(lambda n: torch.randint(0, vocabulary, (n,), generator=generator)),
            "loss_mask": nested(lambda n: (torch.arange(n) >= n // 2).long()),
            "position_ids": nested(torch.arange),
        },
        non_tensor_dict={
            "use_remove_padding": False,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch,
            "temperature": 1.0,
            "global_batch_size": rows,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
        },
    )


def run(model: str, rows: int, length: int, micro_batch: int, seed: int) -> dict[str, Any]:
    """Compute log-probs, then loss and gradients of one training step, on the same batch and weights."""
    from functools import partial

    import torch
    from verl.utils.device import get_device_name
    from verl.workers.utils.losses import sft_loss

    torch.manual_seed(seed)
    engine = build(model, micro_batch)
    config = engine.module.config
    data = batch(config.vocab_size, rows, length, micro_batch, seed)
    data = data.to(get_device_name())
    with engine.eval_mode():
        output = engine.infer_batch(data, loss_function=None)
    log_probs = output["model_output"]["log_probs"].values().float().cpu()
    with engine.train_mode():
        output = engine.train_batch(data, loss_function=partial(sft_loss, config=None))
        norms = {name: _norm(parameter.grad) for name, parameter in engine.module.named_parameters()}
    activation = sys.modules.get("verl_fl_overlay.activation")  # there only if verl loaded the overlay
    overlay = activation.report() if activation else None
    return {
        "log_probs": log_probs,
        "loss": float(sum(output["loss"])),
        "grad_norm": float(output["metrics"]["grad_norm"]),
        "grad_norms": norms,
        "tokens": log_probs.numel(),
        "overlay": json.loads(json.dumps(overlay)),
    }


def _norm(gradient: Any) -> float:
    """Return the 2-norm of a parameter's gradient, 0 if it has none."""
    if gradient is None:
        return 0.0
    return float(getattr(gradient, "to_local", lambda: gradient)().double().norm())


def steps(model: str, rows: int, length: int, micro_batch: int, seed: int = 0) -> Any:
    """Build the engine in this process; return a function that runs one training step of it."""
    from functools import partial

    import torch
    import verl  # noqa: F401
    from verl.utils.device import get_device_name
    from verl.workers.utils.losses import sft_loss

    if not torch.distributed.is_initialized():
        join_group()
    engine = build(model, micro_batch)
    data = batch(engine.module.config.vocab_size, rows, length, micro_batch, seed).to(get_device_name())

    def step() -> None:
        with engine.train_mode():
            engine.train_batch(data, loss_function=partial(sft_loss, config=None))

    return step


def main() -> None:
    """Run the trial that the command line describes and save what it computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("result")
    for option, default in {"rows": 4, "length": 256, "micro-batch": 2, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    import torch
    import verl  # noqa: F401

    join_group()
    torch.save(run(options.model, options.rows, options.length, options.micro_batch, options.seed), options.result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
