"""What the phases of an RL step take: how much work a model has with a batch, times what a unit of it took.

``work`` counts, from the model's sizes and the sequences' lengths alone.  ``cost.json`` has the unit costs, which
``tools/cost.py`` fits from docs/measurements.  docs/cost.md has the formula, and how far it is from what was measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fl_overlay.errors import OverlayError

FILE = Path(__file__).with_name("cost.json")

STACKS = {
    "padded": (True, True),
    "flash-attn": (False, True),
    "overlay": (False, False),
    "padded overlay": (True, False),
}
"""What trains -> whether sequences are padded, and whether modules, Adam and entropy are native."""

PHASES = {"old_log_prob": (False, True), "ref": (False, False), "update_actor": (True, False)}
"""verl's phases -> whether they train, and whether entropy is asked for."""

ATTENTION = 4.0
"""How many FLOP of matrix products take as long as one of packed attention; assumed, see docs/cost.md."""


class CostError(OverlayError):
    """A model, a chip or a batch of which the cost model knows nothing."""


@dataclass(frozen=True)
class Chip:
    """A chip's peaks, as its maker gives them: bf16 FLOP/s without sparsity, bytes/s of its memory and of its link."""

    flops: float
    memory: float
    link: float
    gigabytes: float = float("inf")
    """How large its memory is."""


CHIPS = {"H100": Chip(989e12, 3.35e12, 450e9, 80), "H200": Chip(989e12, 4.8e12, 450e9, 141)}
"""The chips of which measurements are there; the link is NVLink, in one direction."""

SCALES = {
    **dict.fromkeys(("products", "masked attention"), "flops"),
    **dict.fromkeys(("memory", "native modules", "entropy infer", "entropy train"), "memory"),
    "link": "link",
}
"""Unit cost -> the peak that it is the inverse of; the others are the host's, and the same on each chip."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder whose MLPs have a gate."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool

    @property
    def attention(self) -> tuple[int, int]:
        """The width of all queries, and of all keys."""
        return self.heads * self.head, self.kv_heads * self.head

    @property
    def matrices(self) -> tuple[int, int]:
        """The parameters of all layers' matrices, and of the head."""
        layer = 2 * self.hidden * sum(self.attention) + 3 * self.hidden * self.intermediate
        return self.layers * layer, self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters that count."""
        layers, head = self.matrices
        return layers + head * (1 if self.tied else 2)


def shape(config: Mapping[str, Any]) -> Shape:
    """Return the sizes that a config.json tells.

    Raises:
        CostError: it is no dense decoder for text, or does not tell a size.
    """
    for keys, what in {
        ("vision_config", "audio_config", "text_config", "thinker_config"): "reads more than text",
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"): "is a mixture of experts",
        ("kv_lora_rank", "q_lora_rank"): "has latent attention",
    }.items():
        if found := [key for key in keys if config.get(key)]:
            raise CostError(f"the model {what} ({found[0]} in its config.json); only dense decoders were measured")

    def number(key: str, otherwise: int | None = None) -> int:
        value = otherwise if config.get(key) is None else config[key]
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CostError(f"config.json has {key} = {config.get(key)!r}; needed is a whole number, 1 or more")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    kv_heads = number("num_key_value_heads", heads)
    tied = config.get("tie_word_embeddings", True)  # transformers 4 leaves out what is both its and Gemma's default
    if heads % kv_heads:
        raise CostError(f"config.json has {heads} heads, and {kv_heads} of keys and values, which they cannot share")
    if type(tied) is not bool:
        raise CostError(f"config.json has tie_word_embeddings = {tied!r}; needed is true or false")
    return Shape(
        number("num_hidden_layers"),
        hidden,
        number("intermediate_size"),
        heads,
        kv_heads,
        number("head_dim", hidden // heads),
        number("vocab_size"),
        tied,
    )


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the sequences in up to ``parts`` of about the same work, by verl's own measure of it: 24,576 n + n^2."""
    made: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for length in sorted(lengths, reverse=True):
        load, least = loads[0]
        made[least].append(length)
        heapq.heapreplace(loads, (load + 24576 * length + length**2, least))
    return [part for part in made if part]


def micro_batches(
    lengths: Sequence[int], *, chips: int = 1, updates: int = 1, tokens: int = 0, rows: int = 0
) -> list[list[int]]:
    """Return the micro-batches of the chip with the most tokens: of up to ``tokens``, or of ``rows`` sequences.

    The sequences are spread over ``updates`` mini-batches first, and no micro-batch has sequences of two.

    Raises:
        CostError: a sequence is longer than ``tokens``.
    """
    if rows:
        own = lengths[::chips]
        return [list(own[start : start + rows]) for start in range(0, len(own), rows)]
    if max(lengths) > tokens:
        raise CostError(f"a sequence has {max(lengths):,} tokens, a micro-batch up to {tokens:,}: verl refuses that")
    made: list[list[int]] = []
    for part in balanced(lengths, updates):
        own = max(balanced(part, chips), key=sum)
        count = -(-sum(own) // tokens)
        while max(map(sum, balanced(own, count))) > tokens:
            count += max(1, count // 100)  # verl adds one at a time
        made += balanced(own, count)
    return made


def work(
    shape: Shape,
    micro: Sequence[Sequence[int]],
    stack: str,
    *,
    train: bool,
    entropy: bool = False,
    recompute: bool = True,
    chips: int = 1,
    updates: int = 1,
) -> dict[str, float]:
    """Return unit cost -> how much of it one chip has in a phase: FLOP, bytes, layers x micro-batches, or tokens.

    A training pass goes through a layer's products 4 times (forward, recomputed, and twice backward), through its
    attention 4.5 times, through the head 3 times; where layers do not recompute, once less.
    """
    padded, native = STACKS[stack]
    phase = "train" if train else "infer"
    (queries, keys), (in_layers, in_head) = shape.attention, shape.matrices
    real = sum(map(sum, micro))
    tokens = sum(len(rows) * max(rows) for rows in micro) if padded else real
    pairs = sum(2 * len(rows) * max(rows) ** 2 if padded else sum(n**2 for n in rows) for rows in micro)
    passes = 3 + recompute if train else 1
    attention = 2 * queries * shape.layers * pairs * (3.5 + recompute if train else 1)
    products = 2 * tokens * (in_layers * passes + in_head * (3 if train else 1))
    per_token = 10 * shape.hidden + 4 * (queries + keys) + 3 * shape.intermediate
    modules = 2 * tokens * shape.layers * per_token * passes
    logits = 2 * tokens * shape.vocabulary
    adam = shape.parameters / chips * (80 if native else 28) * updates if train else 0
    found = {
        "products": products + (0 if padded else ATTENTION * attention),
        "masked attention": attention if padded else 0,
        "native modules": modules if native else 0,
        "memory": (0 if native else modules) + logits * (3 if train else 1) + adam,
        f"entropy {phase}": logits if native and entropy else 0,
        f"host {'native' if native else 'overlay'} {phase}": shape.layers * len(micro) * (passes / 4 if train else 1),
        f"loop {phase}": real if padded and native else 0,
        "link": shape.parameters * (1 - 1 / chips) * len(micro) * (8 if train else 2),
    }
    return {name: amount for name, amount in found.items() if amount}


AFTER = ("entropy", "loop", "link", "dispatch")
"""How the names of the unit costs begin that are added: the host and the chip share what is not among these."""


def parts(amounts: Mapping[str, float], costs: Mapping[str, float], chip: Chip) -> tuple[float, float, float]:
    """Return the seconds of the chip, those that its host needs to launch that, and what is added to the longer one."""
    taken = {name: amount * costs[name] * scale(name, chip) for name, amount in amounts.items()}
    after = sum(seconds for name, seconds in taken.items() if name.startswith(AFTER))
    host = sum(seconds for name, seconds in taken.items() if name.startswith("host"))
    return sum(taken.values()) - after - host, host, after


def seconds(amounts: Mapping[str, float], costs: Mapping[str, float], chip: Chip) -> float:
    """Return what the work takes, by unit costs that hold for an H100."""
    on_chip, host, after = parts(amounts, costs, chip)
    return max(on_chip, host) + after


def waiting(amounts: Mapping[str, float], costs: Mapping[str, float], chip: Chip) -> float:
    """Return for how much of it the chip waits: for its host, and for Ray's dispatch."""
    on_chip, host, _ = parts(amounts, costs, chip)
    return max(host - on_chip, 0.0) + amounts.get("dispatch", 0) * costs["dispatch"]


def scale(name: str, chip: Chip) -> float:
    """Return how many times an H100's unit cost ``name`` is on ``chip``."""
    peak = SCALES.get(name)
    return getattr(CHIPS["H100"], peak) / getattr(chip, peak) if peak else 1.0


def peak_bytes(
    shape: Shape, micro: Sequence[Sequence[int]], stack: str, *, train: bool, entropy: bool = False, chips: int = 1
) -> float:
    """Return the most memory of a chip in a phase.

    fp32 weights, gradients and Adam's two moments; a bf16 copy of the embedding and of its gradient; of the largest
    micro-batch the logits and, in training, each layer's input, all in bf16.  Native log-probs keep the logits in fp32
    where sequences are padded; native entropy makes 4 more copies of the logits there, and what is 2 elsewhere.
    """
    padded, native = STACKS[stack]

    def of(rows: Sequence[int]) -> int:
        tokens = len(rows) * max(rows) if padded else sum(rows)
        kept = 2 * shape.layers * shape.hidden * tokens
        in_fp32 = 4 * shape.vocabulary * sum(rows) if padded and native else 0
        copies = 1 + (4 if padded else 2) * (native and entropy)
        return 2 * shape.vocabulary * tokens * copies + (kept + in_fp32 if train else 0)

    return 16 * shape.parameters / chips + 4 * shape.matrices[1] + max(map(of, micro))
