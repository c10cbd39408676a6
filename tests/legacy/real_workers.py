"""verl 0.7's real legacy workers on a CPU, one process: actor, reference and critic built, asked and trained.

Prints JSON: for every call whether the training phase was on in each forward pass of the model and after the call, the
results as hexadecimal floats, and the overlay's report:  python tests/legacy/real_workers.py MODEL [OPTIONS]

``--uneven`` gives prompts of different lengths, padded on the left.  ``--packed`` is verl's default: packed sequences
and flash_attention_2; without it batches stay padded, with sdpa, as plain verl can run them without flash-attn.

``--flagos`` puts stand-ins in the place of FlagGems' kernels, and enables its ``mul`` beforehand in the whole process,
as vLLM's plugin does where vLLM lives in the trainer's process (verl 0.7.0).

``--critic=MODEL`` gives the critic another model, and prints the attention that it has.

``--fsdp1`` takes FSDP1, verl's default, with parameters and optimizers offloaded, and saves and loads both in the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "examples")]

PROMPT, RESPONSE, ROWS = 6, 4, 4


def critics(model: str) -> str:
    """Return the critic's model."""
    return next((option.removeprefix("--critic=") for option in sys.argv if option.startswith("--critic=")), model)


def config_of(model: str) -> Any:
    """Compose verl's own ppo_trainer configuration for a small model."""
    import verl
    from hydra import compose, initialize_config_dir

    padded = {
        "actor_rollout_ref.model.use_remove_padding": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "critic.model.use_remove_padding": False,
        "+critic.model.override_config.attn_implementation": "sdpa",
    }
    packed = dict.fromkeys(("actor_rollout_ref.model.use_remove_padding", "critic.model.use_remove_padding"), True)
    how = packed if "--packed" in sys.argv else padded
    strategy = "fsdp" if "--fsdp1" in sys.argv else "fsdp2"
    configs = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.model.fsdp_config")
    offloaded = [f"{config}.{what}_offload=True" for config in configs for what in ("param", "optimizer")]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"actor_rollout_ref.model.path={model}",
                *(f"{name}={value}" for name, value in how.items()),
                f"actor_rollout_ref.actor.strategy={strategy}",
                "actor_rollout_ref.actor.use_torch_compile=False",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
                "actor_rollout_ref.actor.optim.lr=1e-3",
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
                f"actor_rollout_ref.ref.strategy={strategy}",
                "actor_rollout_ref.ref.use_torch_compile=False",
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
                f"critic.model.path={critics(model)}",
                f"critic.strategy={strategy}",
                "critic.ppo_mini_batch_size=4",
                "critic.ppo_micro_batch_size_per_gpu=2",
                "critic.forward_micro_batch_size_per_gpu=2",
                "critic.optim.lr=1e-3",
                *(offloaded if strategy == "fsdp" else []),
            ],
        )


def batch() -> Any:
    """Return a DataProto as the trainer hands it to its workers; tensors are [4, 10] and [4, 4]."""
    import torch
    from verl import DataProto

    numbers = torch.Generator().manual_seed(0)
    length = PROMPT + RESPONSE
    ids = torch.randint(4, 78, (ROWS, length), generator=numbers)
    small = torch.rand((3, ROWS, RESPONSE), generator=numbers)
    mask = torch.ones_like(ids)
    for row in range(ROWS if "--uneven" in sys.argv else 0):
        mask[row, :row] = 0
    return DataProto.from_dict(
        tensors={
            "input_ids": ids,
            "responses": ids[:, PROMPT:],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "response_mask": torch.ones(ROWS, RESPONSE, dtype=torch.long),
            "old_log_probs": -4.4 + small[0],
            "advantages": small[1] - 0.5,
            "values": small[2],
            "returns": small[0],
        },
        meta_info={"temperature": 1.0, "global_token_num": [length] * ROWS},
    )


class Watch:
    """Notes whether the phase is on in every forward pass of ``model`` during a call, and after it."""

    def __init__(self, model: Any) -> None:
        self.seen: list[bool] = []
        model.register_forward_pre_hook(lambda module, inputs: self.seen.append(phase_is_on()))

    def call(self, method: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        self.seen.clear()
        output = method(batch())
        return output, {"inside": list(self.seen), "after": phase_is_on(), **extra}


class FlagOS:
    """Stand-ins for FlagGems' kernels, and somebody else's ``mul``; how often each was called inside and outside."""

    def __init__(self) -> None:
        import torch
        from flaggems import stand_ins
        from fused.stand_ins import StandIns

        from verl_fl_overlay.features.fused import Fused
        from verl_fl_overlay.flaggems import library
        from verl_fl_overlay.kernels import agreement as fused_check
        from verl_fl_overlay.settings import Settings

        self.theirs = {"inside": 0, "outside": 0}
        self.routed, self.fused = stand_ins.calls, StandIns()
        library.load = stand_ins.gems
        sys.modules.update(self.fused.modules())
        fused_check.NATIVE_DEVICES = ()
        self.feature = Fused(Settings.of(fused=("gated_mlp", "adam")))  # a CPU has none: the settings leave it out
        self.feature.start()

        def mul(a: Any, b: Any) -> Any:
            self.theirs["inside" if phase_is_on() else "outside"] += 1
            return stand_ins.multiply(a, b)

        self.before = torch.library.Library("aten", "IMPL")
        self.before.impl("mul.Tensor", mul, "CPU")

    def told(self) -> dict[str, Any]:
        """Multiply once more, outside the phase; return what was called."""
        import torch

        inside = dict(self.routed)
        outside = self.theirs["outside"]
        a = torch.rand(4, 4)
        (a * a) @ a
        return {
            "theirs": self.theirs,
            "theirs after": self.theirs["outside"] - outside,
            "routed": inside,
            "routed after": self.routed.total() - sum(inside.values()),
            "fused": self.fused.calls["gated"],
            "replaced": self.feature.describe()["replaced"],
        }


def phase_is_on() -> bool:
    from verl_fl_overlay.phase import training

    return training.active


def hexed(tensor: Any) -> list[str]:
    return [value.hex() for value in tensor.double().flatten().tolist()]


def main() -> None:
    from real_engine import free_port

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    import torch
    from real_engine import count_derived_lengths
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

    from verl_fl_overlay.activation import report as build

    torch.manual_seed(0)
    torch.set_num_threads(1)
    derived = count_derived_lengths()
    flagos = FlagOS() if "--flagos" in sys.argv else None
    config = config_of(sys.argv[1])
    calls: dict[str, Any] = {}

    actor = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    actor.init_model()
    watch = Watch(actor.actor_module_fsdp)
    output, calls["compute_log_prob"] = watch.call(actor.compute_log_prob)
    calls["compute_log_prob"]["result"] = hexed(output.batch["old_log_probs"])
    calls["compute_log_prob"]["expected"] = hexed(reference_log_probs(sys.argv[1]))
    before = weights(actor.actor_module_fsdp)
    output, calls["update_policy"] = watch.call(actor.update_actor)
    after = weights(actor.actor_module_fsdp)
    calls["update_policy"]["result"] = [float(v).hex() for v in output.meta_info["metrics"]["actor/grad_norm"]]
    calls["update_policy"]["change"] = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))

    reference = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="ref")
    reference.init_model()
    output, calls["compute_ref_log_prob"] = Watch(reference.ref_module_fsdp).call(reference.compute_ref_log_prob)
    calls["compute_ref_log_prob"]["result"] = hexed(output.batch["ref_log_prob"])

    critic = CriticWorker(config=omega_conf_to_dataclass(config.critic))
    critic.init_model()
    watch = Watch(critic.critic_module)
    output, calls["compute_values"] = watch.call(critic.compute_values)
    calls["compute_values"]["result"] = hexed(output.batch["values"])
    output, calls["update_critic"] = watch.call(critic.update_critic)
    calls["update_critic"]["result"] = [float(v).hex() for v in output.meta_info["metrics"]["critic/grad_norm"]]

    critics_model = getattr(critic.critic_module, "pretrained_model", critic.critic_module)
    calls["compute_values"]["attention"] = critics_model.config._attn_implementation

    if "--fsdp1" in sys.argv:
        for worker, module in ((actor, actor.actor_module_fsdp), (critic, critic.critic_module)):
            with tempfile.TemporaryDirectory() as folder:
                saved = weights(module)
                worker.save_checkpoint(folder)
                for parameter in module.parameters():
                    parameter.data.zero_()
                worker.load_checkpoint(folder)
            assert all(map(torch.equal, weights(module), saved))

    told = {"flagos": flagos and flagos.told(), "report": build(), "derived lengths": derived[0]}
    print("RESULT " + json.dumps({"calls": calls, **told}))
    torch.distributed.destroy_process_group()


def weights(model: Any) -> list[Any]:
    """Return copies of a model's parameters, whole."""
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def reference_log_probs(model: str) -> Any:
    """Compute the responses' log-probs by Hugging Face alone, in fp32; [4, 4]."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = batch().batch["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model).float()(input_ids=ids).logits
    log_probs = logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


if __name__ == "__main__":
    main()
