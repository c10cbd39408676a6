"""A rollout backend for verl 0.9.1 that samples with Hugging Face's ``generate``, on a CPU.  For demonstration only.

verl generates with vLLM, SGLang or TensorRT-LLM, and none of them runs everywhere verl trains.  This one is slow and
small: one server (a Ray actor) a replica, one copy of the model a server, no cache between requests.  verl loads it
through two of its own settings, ``model.external_lib=hf_rollout`` and ``rollout.name=hf``.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

NAME = "hf"
GATHER = 0.02
"""How long a server waits for more requests before it generates for all that wait, seconds."""


def server_name(replica_rank: int) -> str:
    return f"{NAME}_server_{replica_rank}"


class Server:
    """Holds the model and answers ``LLMServerClient``: prompt token ids in, sampled token ids and log-probs out."""

    def __init__(self, model: str, response_length: int, batch: int, seed: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        # Random weights: the trainer sends the real ones before the first request.
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.response_length = response_length
        self.batch = batch
        self.global_steps: int | None = None
        self.waiting: list[tuple[list[int], dict[str, Any], asyncio.Future[TokenOutput]]] = []

    async def ready(self) -> bool:
        return True

    async def load_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        self.model.load_state_dict(weights)
        self.global_steps = global_steps

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **inputs: Any
    ) -> TokenOutput:
        given = sorted(name for name, value in inputs.items() if value is not None)
        if given:
            raise NotImplementedError(f"the {NAME} rollout generates from text alone; got {', '.join(given)}")
        answer: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt_ids, sampling_params, answer))
        await asyncio.sleep(GATHER)
        if not answer.done():
            self._answer_alike(sampling_params)
        return await answer

    def _answer_alike(self, sampling: dict[str, Any]) -> None:
        """Generate for the requests that wait with the same sampling parameters, as many as a batch holds."""
        alike = [request for request in self.waiting if request[1] == sampling]
        self.waiting = [request for request in self.waiting if request[1] != sampling]
        for begin in range(0, len(alike), self.batch):
            requests = alike[begin : begin + self.batch]
            outputs = self._sample([prompt for prompt, _, _ in requests], sampling)
            for (_, _, answer), output in zip(requests, outputs, strict=True):
                answer.set_result(output)

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[TokenOutput]:
        longest = max(map(len, prompts))
        padding = self.model.config.pad_token_id
        tokens = torch.tensor([[padding] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        temperature = sampling.get("temperature", 1.0)
        generated = self.model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=sampling.get("max_tokens", self.response_length),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=sampling.get("top_p", 1.0) if temperature else None,
            top_k=max(0, sampling.get("top_k", 0)) if temperature else None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers = generated.sequences[:, longest:]
        logits = torch.stack(generated.logits, dim=1).float() / (temperature or 1.0)
        log_probs = logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        return [self._output(row, probs) for row, probs in zip(answers.tolist(), log_probs.tolist(), strict=True)]

    def _output(self, tokens: list[int], log_probs: list[float]) -> TokenOutput:
        """Cut the padding after the end token off, which stays in."""
        end = self.model.config.eos_token_id
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        return TokenOutput(
            token_ids=tokens[:length],
            log_probs=log_probs[:length],
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing where verl frees or restores the memory of an accelerator, or its caches."""

    sleep = wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = abort_all_requests = resume_generation = nothing


class Replica(RolloutReplica):
    """Starts the server of one replica: with tensor parallel 1, one for each training process."""

    async def launch_servers(self) -> None:
        options = {"name": server_name(self.replica_rank), "num_cpus": 0, "max_concurrency": self.max_concurrency}
        server = (
            ray.remote(Server)
            .options(**options)
            .remote(
                self.model_config.path,
                response_length=self.config.response_length,
                batch=self.config.max_num_seqs,
                seed=self.config.seed + self.replica_rank,
            )
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = server_name(self.replica_rank)


class ServerAdapter(BaseRollout):
    """Sends the weights from a training process to its server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = device_mesh["dp"].get_local_rank() if replica_rank == -1 else replica_rank

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **kwargs: Any
    ) -> None:
        if wire_format != "named_tensors":
            raise NotImplementedError(f"the {NAME} rollout takes named tensors; got {wire_format}")
        tensors = {name: tensor.float() async for name, tensor in ensure_async_iterator(weights)}
        await ray.get_actor(server_name(self.replica_rank)).load_weights.remote(tensors, global_steps)

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: the server keeps its memory."""

    async def release(self) -> None:
        """Do nothing: the server keeps its memory."""


RolloutReplicaRegistry.register(NAME, lambda: Replica)
_ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.ServerAdapter"
