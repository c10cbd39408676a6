"""What a release of verl has to be told on its command line: the keys of its configuration, and why each is needed.

Tests hold that every key is in the configuration of its release, and that no line repeats verl's own default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import Version

TASKS = ("grpo", "ppo", "sft")
ENGINES = ("fsdp", "fsdp2", "megatron")

LENGTH = 512
"""verl's own limit for a prompt, and for a response."""

TOKENS = {"actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 16384, "critic.ppo_max_token_len_per_gpu": 32768}
"""The key of the most tokens of a micro-batch -> verl's own value; a longer sequence does not fit."""

TOKENS_SFT = {"data.max_token_len_per_gpu": 8192}


@dataclass(frozen=True)
class Job:
    """What is to be trained, and where.

    ``device`` is torch's name of the chip.  ``model`` is a folder, "" if it is not known.  ``prompt`` and ``response``
    are the most tokens of each, None for verl's own limits.  ``packs`` tells whether the model keeps packed sequences
    apart, ``has_te`` whether TransformerEngine is here, ``sleeps`` whether what generates can give back its memory.
    """

    release: Version
    task: str
    engine: str
    rollout: str
    device: str
    model: str = ""
    prompt: int | None = None
    response: int | None = None
    packs: bool = True
    has_te: bool = True
    sleeps: bool = True

    @property
    def line(self) -> tuple[int, int]:
        """The release line, such as (0, 9)."""
        return self.release.major, self.release.minor

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return (self.prompt or LENGTH) + (self.response or LENGTH)


@dataclass(frozen=True)
class Override:
    """A key of verl's configuration, the value that it needs as hydra reads it, and the reason in a line."""

    key: str
    value: str
    why: str


def command(job: Job) -> str:
    """Return how verl is started."""
    if job.task == "sft":
        return "torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer"
    own_config = " --config-name=ppo_megatron_trainer" if job.engine == "megatron" and job.line < (0, 8) else ""
    return f"python -m verl.trainer.main_ppo{own_config}"


def left_to_user(job: Job) -> list[str]:
    """Return the keys that nobody else can fill in."""
    model = [] if job.model else _models(job)
    shared = ["data.train_files", "data.val_files", *model, "trainer.n_gpus_per_node"]
    if job.task == "sft":
        return shared
    return [*shared, "actor_rollout_ref.rollout.tensor_model_parallel_size"]


def overrides(job: Job) -> list[Override]:
    """Return what the job needs and verl does not do when nothing is said."""
    of_task = _sft(job) if job.task == "sft" else _reinforced(job)
    return [*of_task, *_lengths(job), *_padded(job), Override("trainer.logger", "[console]", LOGGER)]


def not_needed(job: Job) -> list[str]:
    """Return the keys that others tell to set, and that the job does not need."""
    said = " ".join(override.key for override in overrides(job))
    return [key for key in ("attn_implementation", "use_remove_padding", "use_fused_kernels") if key not in said]


LOGGER = "verl's default adds wandb, which asks for a login"
STRATEGY = "verl's default is FSDP1"
BRIDGE = "verl's default, Megatron-Bridge, needs TransformerEngine, which is not installed here"
AWAKE = "the plugin's worker cannot give its memory back while verl trains, which verl's default asks for"
PATH = "the model's folder; absolute, since verl's processes run in other folders"


def _quoted(path: str) -> str:
    r"""Return a path as hydra reads it: plain where no letter means something to hydra, else in quotes.

    In quotes a backslash is doubled before a quote, and is itself elsewhere.
    """
    if re.fullmatch(r"[\w./+@%-]+", path, re.ASCII):
        return path
    doubled = re.sub(r"(\\*)('|$)", r"\1\1\2", path)
    return "'" + doubled.replace("'", r"\'") + "'"


def _models(job: Job) -> list[str]:
    if job.task == "sft":
        return ["model.path"]
    return ["actor_rollout_ref.model.path", *(["critic.model.path"] if job.task == "ppo" else [])]


def _sft(job: Job) -> Iterator[Override]:
    if job.model:
        yield Override("model.path", _quoted(job.model), PATH)
    if job.engine == "megatron":
        yield Override("engine", "megatron", "verl's default is FSDP")
        yield Override("optim", "megatron", "the optimizer of that engine")
        if job.line >= (0, 9) and not job.has_te:
            yield Override("engine.vanilla_mbridge", "True", BRIDGE)
    elif job.engine == "fsdp2":
        yield Override("engine.strategy", "fsdp2", STRATEGY)
    if job.device != "cuda" and job.release < Version("0.7.1"):
        yield Override("trainer.device", job.device, "the SFT trainer of this release does not look which chip is here")


def _reinforced(job: Job) -> Iterator[Override]:
    roles = {"actor_rollout_ref.actor": True, "critic": job.task == "ppo"}
    trained = [role for role, is_trained in roles.items() if is_trained]
    if job.task == "grpo":
        yield Override("algorithm.adv_estimator", "grpo", "verl's default is GAE, which needs a critic")
        yield Override("actor_rollout_ref.rollout.n", "8", "answers to each prompt, which are compared; verl's is 1")
    for key in _models(job) if job.model else ():
        yield Override(key, _quoted(job.model), PATH)
    if job.engine == "megatron" and job.line >= (0, 8):
        yield Override("model_engine", "megatron", "verl's default is FSDP")
    for role in trained:
        if job.engine == "fsdp2":
            yield Override(
                f"{role}.strategy", "fsdp2", STRATEGY + ("; the reference follows" if "actor" in role else "")
            )
        if job.engine == "megatron" and job.line >= (0, 9) and not job.has_te:
            yield Override(f"{role}.megatron.vanilla_mbridge", "True", BRIDGE)
    yield Override("actor_rollout_ref.rollout.name", job.rollout, "verl has no default")
    for key in () if job.sleeps else ("+{}.enable_sleep_mode", "{}.free_cache_engine"):
        yield Override(key.format("actor_rollout_ref.rollout"), "False", AWAKE)
    why = "micro-batches by tokens; without it verl asks for the size of each, and all other passes follow"
    yield Override("actor_rollout_ref.actor.use_dynamic_bsz", "True", why)
    if job.line < (0, 8) and job.packs:
        key = "actor_rollout_ref.model" if job.engine == "megatron" else "critic.model"
        if job.engine == "megatron" or job.task == "ppo":
            yield Override(f"{key}.use_remove_padding", "True", "this release packs all but that by default")


def _lengths(job: Job) -> Iterator[Override]:
    given = job.prompt is not None or job.response is not None
    if job.task == "sft":
        if given:
            yield Override("data.max_length", str(job.longest), "the most tokens of a prompt and its response")
    elif given:
        yield Override("data.max_prompt_length", str(job.prompt or LENGTH), "--prompt")
        yield Override("data.max_response_length", str(job.response or LENGTH), "--response")
    for key, tokens in (TOKENS_SFT if job.task == "sft" else TOKENS).items():
        if job.longest > tokens and (job.task == "ppo" or not key.startswith("critic")):
            yield Override(key, str(job.longest), f"the longest sequence has to fit; verl's own is {tokens}")


def _padded(job: Job) -> Iterator[Override]:
    """Yield that nothing is packed, for a model that does not keep packed sequences apart."""
    if job.packs or job.engine == "megatron":
        return
    for key in _models(job):
        if not (job.line < (0, 8) and key.startswith("critic")):  # padded by default
            yield Override(
                key.replace(".path", ".use_remove_padding"),
                "False",
                "layers without attention mix packed sequences without their own kernels, fla and causal_conv1d",
            )
