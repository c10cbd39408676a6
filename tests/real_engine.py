"""verl's real engines on small models: built, trained and asked for log-probs, with or without the overlay.

As a program it runs engines in a process of its own and prints JSON, floats as hexadecimal, so that two runs can be
compared bit for bit:  python tests/real_engine.py MODEL --cases lm:fsdp2,value:fsdp [--plain]

Batches are padded, with sdpa, as plain verl can run them without flash-attn; ``--packed`` is verl's default instead.
Several runs share a process, and the seconds that it imports: MODEL --packed --then MODEL; their results are a list.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

THEN = "--then"
"""Between the arguments of two runs in one process."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join_group(plain: bool) -> None:
    """Initialise the process group, alone unless torchrun set ranks: by verl, or without it when ``plain``."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    if plain:
        import torch.distributed

        bare_platform()
        torch.distributed.init_process_group("gloo")
    else:
        from verl.utils.distributed import initialize_global_process_group

        initialize_global_process_group()


def bare_platform() -> None:
    """Give verl >= 0.9 the least platform that its engines construct on, by its public interface, not the overlay's."""
    try:
        from verl.plugin.platform import PlatformBase, set_platform
    except ImportError:
        return
    import torch

    answers = {name: (lambda self, *args, **kwargs: None) for name in PlatformBase.__abstractmethods__}
    answers |= {"device_name": "cpu", "vendor_name": "cpu", "device_module": torch.cpu}
    answers |= {"is_available": lambda self: True, "current_device": lambda self: "cpu"}
    answers |= {"communication_backend_name": lambda self: "gloo"}
    set_platform(type("BarePlatform", (PlatformBase,), answers)())


def configs(
    model: str, strategy: str, head: str, *, packed: bool = False, hf: dict[str, Any] | None = None, **engine: Any
) -> dict[str, Any]:
    """Return the four configurations an engine is constructed from.

    ``packed`` is verl's default; ``hf`` are fields of ``HFModelConfig``, ``engine`` of ``FSDPEngineConfig``.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    padded = {} if packed else {"use_remove_padding": False, "override_config": {"attn_implementation": "sdpa"}}
    model_config = HFModelConfig(path=model, **{"enable_gradient_checkpointing": False, **padded, **(hf or {})})
    model_config.model_type = {"lm": "language_model", "value": "value_model"}[head]
    defaults = {"use_torch_compile": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
    return {
        "model_config": model_config,
        "engine_config": FSDPEngineConfig(strategy=strategy, **{**defaults, **engine}),
        "optimizer_config": FSDPOptimizerConfig(
            lr=1e-3, weight_decay=0.0, total_training_steps=100, lr_warmup_steps=0, lr_warmup_steps_ratio=0.0
        ),
        "checkpoint_config": CheckpointConfig(),
    }


def make_engine(model: str, strategy: str, head: str, *, plain: bool = False, **engine: Any) -> Any:
    """Construct and initialise an engine: through verl's registry, or its class directly when ``plain``."""
    arguments = configs(model, strategy, head, **engine)
    if plain:
        from verl.workers.engine.fsdp import transformer_impl

        cls = {"lm": "FSDPEngineWithLMHead", "value": "FSDPEngineWithValueHead"}[head]
        made = getattr(transformer_impl, cls)(**arguments)
    else:
        from verl.workers.engine import EngineRegistry

        model_type = arguments["model_config"].model_type
        made = EngineRegistry.new(model_type=model_type, backend=strategy, **arguments)
    made.initialize()
    return made


REFUSED = {
    ("0.7.1", "megatron", "value"): "verl 0.7.1 passes enable_mtp to its own forward function, which does not take it",
    ("0.9.0", "megatron", "value"): "verl 0.9.0 sets share_embeddings_and_output_weights, which TransformerConfig "
    "does not take; mended in 0.9.1",
}
"""(release, strategy, head) -> why that verl cannot train with its own engine, overlay or not."""


def refused(strategy: str, head: str) -> str:
    """Return why the verl that is here cannot train with an engine of its own, "" where it can."""
    return REFUSED.get((version("verl"), strategy, head), "")


def make_batch(rows: int = 4, seed: int = 0, device: str = "cpu", packed: bool = False) -> Any:
    """Return a batch of chats of unequal length as verl's SFT trainer makes it (nested tensors).

    The engine is to pack them, or else to pad them.
    """
    import torch
    from arithmetic import problems, tokenizer
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    words = tokenizer()
    ids, masks, positions = [], [], []
    for number, (question, answer) in enumerate(problems(rows, seed)):
        prompt = words(f"<|im_start|>user\n{'0' * number}{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        reply = words(f"{answer}<|im_end|>\n")["input_ids"]
        ids.append(torch.tensor(prompt + reply, device=device))
        masks.append(torch.tensor([0] * len(prompt) + [1] * len(reply), device=device))
        positions.append(torch.arange(len(ids[-1]), device=device))

    def nested(rows: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    return tu.get_tensordict(
        tensor_dict={"input_ids": nested(ids), "loss_mask": nested(masks), "position_ids": nested(positions)},
        non_tensor_dict={
            "use_remove_padding": packed,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "temperature": 1.0,
            "global_batch_size": rows,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": words.pad_token_id,
        },
    )


def sft_loss() -> Any:
    """Return verl's own SFT loss."""
    from verl.workers.utils.losses import sft_loss as loss

    return partial(loss, config=None)


def squared_values(model_output: Any, data: Any, dp_group: Any = None) -> tuple[Any, dict[str, Any]]:
    """Be a loss for value heads: the mean square of the values, which training drives to zero."""
    values = model_output["values"]
    flat = values.values() if values.is_nested else values
    return (flat.float() ** 2).mean(), {}


def train(engine: Any, head: str, steps: int, packed: bool = False) -> list[dict[str, float]]:
    """Train ``steps`` steps on one batch; return loss and grad_norm of each."""
    loss = sft_loss() if head == "lm" else squared_values
    results = []
    for _ in range(steps):
        with engine.train_mode():
            output = engine.train_batch(make_batch(packed=packed), loss_function=loss)
            engine.lr_scheduler_step()
        if engine.is_mp_src_rank_with_outputs():  # verl gives numbers to one rank alone of those that share a model
            total = sum(float(value) for value in output["loss"])
            results.append({"loss": total, "grad_norm": float(output["metrics"]["grad_norm"])})
    return results


def infer(engine: Any, head: str, packed: bool = False) -> list[float]:
    """Return the values of every token of one batch, or the log-probs of all that have a next one.

    The last token's depends on what lies behind its row, which is another thing in each engine.
    """
    with engine.eval_mode():
        output = engine.infer_batch(make_batch(seed=7, packed=packed), loss_function=None)
    if not engine.is_mp_src_rank_with_outputs():
        return []
    tensor = output["model_output"]["log_probs" if head == "lm" else "values"]
    rows = tensor.unbind()
    return [float(value) for row in rows for value in (row[:-1] if head == "lm" else row).float().flatten()]


def run_case(model: str, head: str, strategy: str, steps: int, packed: bool, **engine: Any) -> dict[str, Any]:
    """Train and infer on a fresh engine; return every number as hexadecimal text."""
    import torch

    torch.manual_seed(0)
    made = make_engine(model, strategy, head, packed=packed, **engine)
    trained = [{name: value.hex() for name, value in step.items()} for step in train(made, head, steps, packed)]
    return {"steps": trained, "values": [value.hex() for value in infer(made, head, packed)]}


def count_derived_lengths() -> list[int]:
    """Count from now on how often transformers derives the lengths of sequences from their positions."""
    from transformers import modeling_flash_attention_utils as flash

    calls, derive = [0], flash._prepare_from_posids

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return derive(*args, **kwargs)

    flash._prepare_from_posids = counted
    return calls


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", default="lm:fsdp2", help="head:strategy, comma-separated")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without verl's registry and helpers for the device")
    parser.add_argument("--packed", action="store_true", help="verl's default: packed, flash_attention_2")
    parser.add_argument("--hf", type=json.loads, default={}, help="fields of HFModelConfig, JSON")
    parser.add_argument("--engine", type=json.loads, default={}, help="fields of FSDPEngineConfig, JSON")
    return parser.parse_args(arguments)


def run_cases(options: argparse.Namespace, derived: list[int]) -> dict[str, Any]:
    """Run the cases of one run; return their numbers, the lengths derived meanwhile and the report up to now."""
    result: dict[str, Any] = {}
    before = derived[0]
    more = {"plain": options.plain, "hf": options.hf, **options.engine}
    for case in options.cases.split(","):
        head, strategy = case.split(":")
        result[case] = run_case(options.model, head, strategy, options.steps, options.packed, **more)
    result["derived lengths"] = derived[0] - before
    if "verl_fl_overlay" in sys.modules:
        from verl_fl_overlay.activation import report as build

        result["report"] = build()
    return result


def main() -> None:
    runs, given = [], sys.argv[1:]
    while given:
        end = given.index(THEN) if THEN in given else len(given)
        runs.append(options_of(given[:end]))
        given = given[end + 1 :]

    import torch

    torch.set_num_threads(1)
    import verl  # noqa: F401

    join_group(runs[0].plain)
    derived = count_derived_lengths()
    results = [run_cases(options, derived) for options in runs]
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results if len(results) > 1 else results[0]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
