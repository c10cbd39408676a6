"""verl 0.7's own PPO actor on a CPU: log-probs, entropy and their gradient, packed and padded.

python tests/logprobs/legacy_actor.py MODEL prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl.utils.torch_functional as verl_functional
from omegaconf import OmegaConf
from real_engine import join_group
from transformers import AutoModelForCausalLM
from verl.workers.actor.dp_actor import DataParallelPPOActor

calls = 0


def counting(native):
    def counted(*args, **kwargs):
        global calls
        calls += 1
        return native(*args, **kwargs)

    return counted


for name in ("logprobs_from_logits_v2", "logsumexp"):
    where = verl_functional if hasattr(verl_functional, name) else torch  # the entropy of verl takes a logsumexp
    setattr(where, name, counting(getattr(where, name)))
join_group(False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="flash_attention_2")
config = {
    "ulysses_sequence_parallel_size": 1,
    "entropy_from_logits_with_chunking": False,
    "entropy_checkpointing": False,
    "use_torch_compile": False,
    "use_remove_padding": False,
    "use_fused_kernels": False,
    "calculate_sum_pi_squared": False,
    "sum_pi_squared_checkpointing": False,
    "fsdp_config": {"dtype": "float32"},
}
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 80, (3, 12), generator=generator)
batch = {
    "input_ids": ids,
    "responses": ids[:, -5:],
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(12).expand(3, 12),
}


def compute(**changed):
    """Return log-probs and entropy, and the gradient of what a PPO loss with an entropy bonus takes."""
    global calls
    calls = 0
    model.zero_grad()
    actor = DataParallelPPOActor(OmegaConf.create({**config, **changed}), model)
    before = vars(actor).copy()
    found = actor._forward_micro_batch(batch, temperature=0.7, calculate_entropy=True)
    assert vars(actor) == before, "the worker's own attributes are put back"
    entropy, log_probs = (found["entropys"], found["log_probs"]) if isinstance(found, dict) else found
    (log_probs.float().sum() + entropy.float().sum()).backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    numbers = {"log_probs": log_probs.flatten().tolist(), "entropy": entropy.flatten().tolist()}
    return {**numbers, "grad_norms": norms, "calls": calls}


CASES = {
    "padded": {},
    "padded, checkpointing": {"entropy_checkpointing": True},
    "packed": {"use_remove_padding": True},
    "packed, checkpointing": {"use_remove_padding": True, "entropy_checkpointing": True},
    "packed, chunks": {"use_remove_padding": True, "entropy_from_logits_with_chunking": True},
}

print(json.dumps({name: compute(**case) for name, case in CASES.items()}))
torch.distributed.destroy_process_group()
