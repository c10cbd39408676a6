"""vLLM as verl starts it, with its worker in a process of its own, beside verl's engine, without Ray; prints JSON.

python tests/rollout/vllm_worker.py MODEL IMPLEMENTATION [CASE ...]: generates with the model as it is, by vLLM's own
layers ("vllm") or by transformers' in vLLM.  Then for each case it trains an engine, gives vLLM the weights through
verl's own transfer, and generates again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flaggems"))

import torch
import verl  # noqa: F401
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

CASES = {
    "padded": ("fsdp2", {}),
    "packed": ("fsdp2", {"packed": True}),
    "packed, fsdp1": ("fsdp", {"packed": True}),
    "adapters merged": (
        "fsdp2",
        {
            "packed": True,
            "hf": {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}},
        },
    ),
}
PACKAGES = ("torch", "transformers", "vllm", "tensordict", "peft", "accelerate")
WAY = {"n": 1, "temperature": 0.0, "max_tokens": 12, "logprobs": 3, "ignore_eos": True}


class Worker(vLLMColocateWorkerExtension):
    """verl's part of vLLM's worker, which also tells of its process."""

    def held(self) -> str:
        """Return the file with the model's weights."""
        file = f"{os.environ['HELD']}/{os.getpid()}.pt"
        torch.save({name: weight.detach().clone() for name, weight in self.model_runner.model.named_parameters()}, file)
        return file

    def told(self) -> str:
        """Return, as JSON, the overlay's report of this process and which functions of others it has wrapped."""
        if "verl_fl_overlay" not in sys.modules:
            return json.dumps({"pid": os.getpid(), "report": None, "wrapped": []})
        from verl_fl_overlay.activation import report

        return json.dumps({"pid": os.getpid(), "report": report(), "wrapped": wrapped()})


def wrapped() -> list[str]:
    """Return every function in the packages of ``PACKAGES`` that is in a wrapper of the overlay's."""
    from verl_fl_overlay.hooks import _Wrapper

    found = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES:
            for value in list(vars(module).values()):
                if type(value) is _Wrapper:
                    found.add(f"{value.__module__}:{value.__qualname__}")
                elif isinstance(value, type):
                    found |= {
                        f"{each.__module__}:{each.__qualname__}"
                        for each in list(vars(value).values())
                        if type(each) is _Wrapper
                    }
    return sorted(found)


def start(model: str, implementation: str) -> Any:
    """Return vLLM with verl's part in its worker."""
    from vllm import LLM

    return LLM(
        model,
        model_impl=implementation,
        worker_extension_cls="vllm_worker.Worker",
        distributed_executor_backend="mp",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        dtype="bfloat16",
        seed=0,
        disable_log_stats=True,
    )


def generate(llm: Any) -> list[Any]:
    """Return tokens and log-probs, as hexadecimal text, of greedy answers."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [2, *range(5, 5 + length), 3]} for length in (3, 9, 14, 20)]
    return [
        [list(one.token_ids), [sorted((t, p.logprob.hex()) for t, p in each.items()) for each in one.logprobs]]
        for one in (answer.outputs[0] for answer in llm.generate(prompts, SamplingParams(**WAY), use_tqdm=False))
    ]


def give(llm: Any, engine: Any) -> None:
    """Send the engine's weights to vLLM's worker through shared memory, as verl does on a chip without IPC."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    (handle,) = llm.collective_rpc("_get_zmq_handle")
    weights, _ = engine.get_per_tensor_param()
    waiting = threading.Thread(
        target=llm.collective_rpc, args=("update_weights_from_ipc",), kwargs={"kwargs": {"use_shm": True}}
    )
    waiting.start()
    asyncio.run(BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True).async_send_weights(weights))
    waiting.join()
    llm.reset_prefix_cache()


def whole(weight: Any) -> Any:
    return getattr(weight, "full_tensor", lambda: weight)().detach().clone()


def as_vllm_has_them(engine: Any) -> dict[str, Any]:
    """Return an engine's weights as transformers has them, in vLLM's joined projections."""
    weights, _ = engine.get_per_tensor_param()
    plain = {name: whole(weight) for name, weight in weights}
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name in list(plain):
        for whole_name, parts in joined.items():
            if f".{parts[0]}." in name:
                together = [plain.pop(name.replace(parts[0], part)) for part in parts]
                plain[name.replace(parts[0], whole_name)] = torch.cat(together)
    return plain


def differing(held: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """Return the names of the weights that are not the same bits in vLLM's type."""
    return sorted(
        name
        for name in held.keys() | trained.keys()
        if name not in held or name not in trained or not torch.equal(held[name], trained[name].to(held[name].dtype))
    )


def features_on() -> Any:
    """Turn on what the CPU has only stand-ins for: FlagGems' operators are routed by the environment."""
    from fused.stand_ins import StandIns

    from verl_fl_overlay.features.fused import Fused
    from verl_fl_overlay.kernels import agreement
    from verl_fl_overlay.settings import Settings

    sys.modules.update(StandIns().modules())
    agreement.NATIVE_DEVICES = ()
    fused = Fused(Settings.of(fused=("auto",)))
    fused.start()
    return fused


def main() -> None:
    model, implementation, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    llm = start(model, implementation)
    found: dict[str, Any] = {"generated": generate(llm), "told": json.loads(llm.collective_rpc("told")[0]), "cases": {}}
    if cases:
        import stand_ins as operators
        from real_engine import join_group, make_engine, train

        from verl_fl_overlay.flaggems import library

        library.load = operators.gems
        join_group(plain=False)
        fused = features_on()
        for case in cases:
            strategy, options = CASES[case]
            torch.manual_seed(0)
            engine = make_engine(model, strategy, "lm", **options)
            before = as_vllm_has_them(engine)
            calls = operators.calls.total()
            train(engine, "lm", 2 + len(found["cases"]), options.get("packed", False))  # to weights of its own
            trained = as_vllm_has_them(engine)
            give(llm, engine)
            held = torch.load(llm.collective_rpc("held")[0])
            found["cases"][case] = {
                "weights": len(held),
                "differ from those trained": differing(held, trained),
                "differ from those before": differing(held, before),
                "operators": operators.calls.total() - calls,
                "generated": generate(llm),
            }
        found["replaced"] = fused.describe()["replaced"]
        torch.distributed.destroy_process_group()
    print("RESULT " + json.dumps(found))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
