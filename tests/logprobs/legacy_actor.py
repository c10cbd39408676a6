"""verl 0.7's own PPO actor on a CPU: log-probs, entropy and their gradient, with the overlay and after it was removed.

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
native = verl_functional.logprobs_from_logits_v2


def counted(*args, **kwargs):
    global calls
    calls += 1
    return native(*args, **kwargs)


verl_functional.logprobs_from_logits_v2 = counted
join_group(False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
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
actor = DataParallelPPOActor(OmegaConf.create(config), model)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 80, (3, 12), generator=generator)
batch = {
    "input_ids": ids,
    "responses": ids[:, -5:],
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(12).expand(3, 12),
}


def compute():
    """Return log-probs, and the gradient of what a PPO loss with an entropy bonus takes."""
    global calls
    calls = 0
    model.zero_grad()
    found = actor._forward_micro_batch(batch, temperature=0.7, calculate_entropy=True)
    entropy, log_probs = (found["entropys"], found["log_probs"]) if isinstance(found, dict) else found
    (log_probs.float().sum() + entropy.float().sum()).backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    return {"log_probs": log_probs.flatten().tolist(), "grad_norms": norms, "calls_of_rows": calls}


from verl_fl_overlay import activation  # noqa: E402

result = {"overlay": compute()}
activation.deactivate()
result["native"] = compute()
print(json.dumps(result))
torch.distributed.destroy_process_group()
