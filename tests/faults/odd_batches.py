"""Batches of GRPO that are odd and lawful, in verl's real engine: two updates with verl's own loss, and log-probs.

``python tests/faults/odd_batches.py MODEL [--plain] [--packed] [--fused] [--bf16]`` prints JSON: case -> the numbers.
``--fused`` puts the overlay's modules and optimizer on stand-ins of the kernels, for a CPU.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import real_engine

PROMPT, RESPONSE = 16, 8
"""verl's max_prompt_length and max_response_length."""

CASES = {
    "every response is the end token": [(5, 1, 1), (9, 1, 1), (3, 1, 1), (12, 1, 1)],
    "every response is masked": [(5, 1, 0), (9, 1, 0), (3, 4, 0), (12, 2, 0)],
    "no response has a token": [(5, 0, 1), (9, 0, 1), (3, 0, 1), (12, 0, 1)],
    "one response has no token": [(5, 0, 1), (9, 4, 1), (3, 1, 1), (12, 8, 1)],
    "a micro-batch has no token that counts": [(5, 2, 1), (9, 4, 1), (3, 1, 0), (12, 0, 1)],
    "verl's own padding rows": [(127, 1, 0), (9, 4, 1), (3, 6, 1), (127, 1, 0)],
    "at the limits and a token below": [
        (PROMPT, RESPONSE, 1),
        (PROMPT, RESPONSE - 1, 1),
        (PROMPT - 1, RESPONSE, 1),
        (1, RESPONSE, 1),
    ],
    "rows of one token": [(1, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 1)],
    "a row of one token among others": [(1, 0, 1), (PROMPT, RESPONSE, 1), (1, 1, 1), (7, 3, 1)],
}
"""Rows are (tokens of the prompt, tokens of the response, whether they count)."""

USUAL = [(6, 5, 1), (9, 4, 1), (3, 7, 1), (12, 2, 1)]


def batch(rows: list[tuple[int, int, int]], packed: bool) -> Any:
    """Return what the trainer gives an actor for these rows."""
    import torch
    from arithmetic import tokenizer
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    words = tokenizer()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 75, (prompt,), generator=generator) for prompt, _, _ in rows]
    responses = [torch.randint(4, 75, (response,), generator=generator) for _, response, _ in rows]
    for response in responses:
        response[-1:] = words.eos_token_id
    noise = [0.1 * torch.randn(response, generator=generator) for _, response, _ in rows]
    masks = [torch.full((response,), counts) for _, response, counts in rows]
    signs = [1.0, -1.0, 0.5, -0.5]

    def nested(parts: list[Any]) -> Any:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    return tu.get_tensordict(
        tensor_dict={
            "input_ids": nested([torch.cat(both) for both in zip(prompts, responses, strict=True)]),
            "position_ids": nested([torch.arange(prompt + response) for prompt, response, _ in rows]),
            "prompts": nested(prompts),
            "responses": nested(responses),
            "loss_mask": nested(masks),
            "response_mask": nested(masks),
            "old_log_probs": nested([-4.3 + each for each in noise]),
            "ref_log_prob": nested([-4.3 - each for each in noise]),
            "advantages": nested([torch.full((len(m),), sign) for m, sign in zip(masks, signs, strict=True)]),
        },
        non_tensor_dict={
            "use_remove_padding": packed,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "temperature": 0.7,
            "global_batch_size": len(rows),
            "calculate_entropy": True,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": words.pad_token_id,
        },
    )


def ppo_loss() -> Any:
    """Return verl's own loss of an actor, with all its parts."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss as loss

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, use_kl_loss=True, entropy_coeff=0.01)
    return partial(loss, config=config)


def infer(engine: Any, rows: list[tuple[int, int, int]], packed: bool, name: str) -> list[float]:
    """Return log-probs or entropy of every token of the responses, as verl's loss takes them from the output."""
    from verl.workers.utils.padding import no_padding_2_padding

    given = batch(rows, packed)
    with engine.eval_mode():
        output = engine.infer_batch(given, loss_function=None)["model_output"]
    padded = no_padding_2_padding(output[name], given)
    return [number for row, (_, response, _) in zip(padded, rows, strict=True) for number in row[:response].tolist()]


def numbers(engine: Any, rows: list[tuple[int, int, int]], packed: bool) -> dict[str, list[float]]:
    """Return log-probs and entropy, loss and grad_norm of two updates, and what these made of a usual batch."""
    found = {name: infer(engine, rows, packed, name) for name in ("log_probs", "entropy")}
    found.update(loss=[], grad_norm=[])
    for _ in range(2):
        with engine.train_mode():
            output = engine.train_batch(batch(rows, packed), loss_function=ppo_loss())
        found["loss"] += [float(value) for value in output["loss"]]
        found["grad_norm"].append(float(output["metrics"]["grad_norm"]))
    return {**found, "after": infer(engine, USUAL, packed, "log_probs")}


def main() -> None:
    import torch

    plain, packed = "--plain" in sys.argv, "--packed" in sys.argv
    torch.set_num_threads(1)
    import verl  # noqa: F401

    real_engine.join_group(plain)
    if "--fused" in sys.argv:
        from fused.stand_ins import StandIns

        from verl_fl_overlay.features.fused import Fused
        from verl_fl_overlay.kernels import agreement
        from verl_fl_overlay.settings import Settings

        sys.modules.update(StandIns().modules())
        agreement.NATIVE_DEVICES = ()
        fused = Fused(Settings.of(fused=("auto",)))
        fused.start()  # the hook on initialize tells it of the engine
    dtype = "bf16" if "--bf16" in sys.argv else "fp32"
    precision = {"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    told = {}
    for case, rows in CASES.items():
        torch.manual_seed(0)
        made = real_engine.make_engine(
            sys.argv[1], "fsdp2", "lm", plain=plain, packed=packed, mixed_precision=precision
        )
        told[case] = numbers(made, rows, packed)
    result: dict[str, Any] = {"told": told, "overlay": "verl_fl_overlay.activation" in sys.modules}
    if result["overlay"]:
        from verl_fl_overlay.activation import report

        result["features"] = {name: each.get("detail") for name, each in report()["features"].items()}
    if "--fused" in sys.argv:
        result["replaced"] = fused.describe()["replaced"]
    print("RESULT " + json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
