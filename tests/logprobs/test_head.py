"""Log-probs and entropy without all logits, from tiny models that treat their logits each in its own way."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from verl_fl_overlay import events  # noqa: E402
from verl_fl_overlay.errors import HeadError  # noqa: E402
from verl_fl_overlay.features import head as feature_module  # noqa: E402
from verl_fl_overlay.kernels import head as head_module  # noqa: E402
from verl_fl_overlay.kernels.agreement import Agreement  # noqa: E402
from verl_fl_overlay.kernels.head import ChunkedHead  # noqa: E402
from verl_fl_overlay.kernels.logprobs import TokenLogprobs  # noqa: E402
from verl_fl_overlay.kernels.tokens import HEAD, Sealed, TokenQuestion  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

VOCABULARY = 120
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
FAMILIES = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen2, tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 2},
}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Have so few logits at a time that tokens and vocabulary are in several parts, the last one not full."""
    for name in ("AT_ONCE", "AT_ONCE_FORWARD"):
        monkeypatch.setattr(head_module, name, 7 * VOCABULARY)


def model_of(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.partition(",")[0], **SIZES, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def run(model, chunked, *, rows=None, temperature=0.8, entropy=True, autocast=None, masked=0.0):
    """Return log-probs and entropy, and every gradient of a loss that uses both."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, 11))
    count = ids.numel() if rows is None else len(rows)
    asked = TokenQuestion(None, torch.randint(0, VOCABULARY, (count,)), temperature, rows, entropy)
    computer = TokenLogprobs(Agreement())
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if chunked:
            heads = ChunkedHead(computer)
            assert heads.fault(model) == ""
            heads.prepare(model)
            found = model(input_ids=ids, use_cache=False, **{HEAD: Sealed(asked)})
            assert not heads.faults, dict(heads.faults)
            found = found["log_probs"], found.get("entropy")
        else:
            logits = model(input_ids=ids, use_cache=False).logits
            labels = asked.labels.view(2, 11) if rows is None else asked.labels
            found = [
                None if each is None else each.flatten()
                for each in computer(replace(asked, logits=logits, labels=labels, rows=rows))[:2]
            ]
    weights = torch.randn(2, count)
    weights[:, : int(masked * count)] = 0
    loss = (found[0] * weights[0]).sum() + (0 if found[1] is None else (found[1] * weights[1]).sum())
    loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return [each.detach() for each in found if each is not None], gradients


def compare(ours, native, bound):
    assert [one.shape for one in ours[0]] == [one.shape for one in native[0]]
    for one, other in zip(ours[0], native[0], strict=True):
        assert float((one - other).norm() / other.norm()) < bound
    assert ours[1].keys() == native[1].keys()
    for name, gradient in native[1].items():
        found = ours[1][name]
        assert found.dtype == gradient.dtype
        assert float((found.float() - gradient.float()).norm()) <= bound * float(gradient.float().norm()), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [None, [0, 3, 4, 9, 12, 21]], ids=["all", "rows"])
def test_a_model_gives_what_its_logits_give(family, rows):
    rows = None if rows is None else torch.tensor(rows)
    model = model_of(family)
    compare(run(model, True, rows=rows), run(model, False, rows=rows), 3e-5)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("given", [{"temperature": None}, {"temperature": torch.rand(2, 11) + 0.5}, {"entropy": False}])
def test_temperatures_and_log_probs_alone(given):
    model = model_of("qwen2")
    compare(run(model, True, **given), run(model, False, **given), 3e-5)


def test_in_bf16_and_under_autocast_it_is_no_further_from_fp32_than_logits_are():
    exact = run(model_of("gemma2"), False)
    for dtype, autocast in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        model = model_of("gemma2", dtype)
        ours, native = (run(model, chunked, autocast=autocast) for chunked in (True, False))
        for name, gradient in exact[1].items():
            off = [float((each[1][name].float() - gradient).norm() / gradient.norm()) for each in (ours, native)]
            assert off[0] < 1.3 * off[1] + 1e-3, (name, off)


def test_a_head_with_a_bias():
    model = model_of("qwen2")
    model.lm_head = nn.Linear(32, VOCABULARY)
    compare(run(model, True), run(model, False), 3e-5)


@pytest.mark.parametrize("masked", [0.05, 0.6, 1.0])
def test_tokens_that_no_loss_uses_are_not_computed_again(monkeypatch, masked):
    model, rows = model_of("gemma2"), []
    native = head_module._gradient

    def counted(work, logits, *args, **kwargs):
        rows.append(logits.shape[0])
        return native(work, logits, *args, **kwargs)

    monkeypatch.setattr(head_module, "_gradient", counted)
    compare(run(model, True, masked=masked), run(model, False, masked=masked), 3e-5)
    assert set(rows) == ({22} if masked == 0.05 else {9} if masked == 0.6 else {0})


def test_a_frozen_head_gets_no_gradient():
    model = model_of("qwen2")
    model.lm_head.requires_grad_(False)
    ours, native = run(model, True), run(model, False)
    compare(ours, native, 3e-5)
    assert "lm_head.weight" not in ours[1]


class Adapted(nn.Linear):
    """A head with an adapter beside it, as PEFT's LoRA makes one."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.low, self.high = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + 2 * self.high(self.low(hidden))


def test_a_head_with_an_adapter():
    model = model_of("gemma2")
    model.lm_head = Adapted(model.lm_head)
    ours, native = run(model, True), run(model, False)
    compare(ours, native, 3e-5)
    assert {"lm_head.low.weight", "lm_head.high.weight"} <= ours[1].keys()


def test_no_more_logits_than_a_part_exist_at_a_time(monkeypatch):
    largest = [0]
    native = nn.functional.linear

    def linear(*args):
        found = native(*args)
        if found.shape[-1] not in (32, 48, 16):
            largest[0] = max(largest[0], found.numel())
        return found

    model = model_of("qwen2")
    monkeypatch.setattr(nn.functional, "linear", linear)
    run(model, True)
    assert 0 < largest[0] <= head_module.AT_ONCE


def test_a_model_that_computes_a_loss_of_its_own_makes_its_logits():
    model, heads = model_of("qwen2"), ChunkedHead(TokenLogprobs(Agreement()))
    ids = torch.randint(1, VOCABULARY, (1, 5))
    expected = model(input_ids=ids, labels=ids)
    heads.prepare(model)
    found = model(input_ids=ids, labels=ids, **{HEAD: Sealed(TokenQuestion(None, ids.flatten()))})
    assert torch.equal(found.logits, expected.logits)
    assert found.loss == expected.loss


def test_a_call_that_asks_nothing_is_the_model_s_own():
    model, heads = model_of("qwen2"), ChunkedHead(TokenLogprobs(Agreement()))
    ids = torch.randint(1, VOCABULARY, (1, 5))
    expected = model(input_ids=ids).logits
    heads.prepare(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert "forward" not in vars(model)


class Crossed(transformers.Qwen2ForCausalLM):
    """Changes its logits by what all of them are."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits - found.logits.mean(-1, keepdim=True)
        return found


def test_a_model_that_needs_all_logits_computes_them_and_tells(monkeypatch):
    plain = model_of("qwen2")
    model = Crossed(plain.config)
    heads = ChunkedHead(TokenLogprobs(Agreement()))
    heads.prepare(model)
    ids = torch.randint(1, VOCABULARY, (1, 5))
    asked = TokenQuestion(None, ids.flatten())
    assert model(input_ids=ids, **{HEAD: Sealed(asked)}).logits.shape == (1, 5, VOCABULARY)
    assert "element by element" in heads.fault(model)


class InPlace(transformers.Qwen2ForCausalLM):
    """Scales its logits in place."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits.mul_(0.5)
        return found


class Looking(transformers.Qwen2ForCausalLM):
    """Needs a largest logit, which there is not where there are none."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits.argmax(-1)
        return found


class Parted(transformers.Qwen2ForCausalLM):
    """Calls what is in its body, and not the body, as OPT does."""

    def forward(self, input_ids, **kwargs):
        self.runs = getattr(self, "runs", 0) + 1
        hidden = self.model.norm(self.model.embed_tokens(input_ids))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize(
    ("kind", "why"), [(InPlace, "in-place"), (Looking, "non-zero size"), (Parted, "only a part of its model")]
)
def test_a_model_that_cannot_run_so_makes_its_logits_and_tells(kind, why):
    model, heads = kind(model_of("qwen2").config), ChunkedHead(TokenLogprobs(Agreement()))
    ids = torch.randint(1, VOCABULARY, (1, 5))
    heads.prepare(model)
    found = model(input_ids=ids, **{HEAD: Sealed(TokenQuestion(None, ids.flatten()))})
    found.logits.sum().backward()
    assert found.logits.shape == (1, 5, VOCABULARY)
    assert why in heads.fault(model)
    assert getattr(model, "runs", 2) == 2, "once to find out, once for the logits"
    assert not {"forward", "model", "lm_head"} & vars(model).keys()


class Full(transformers.Qwen2ForCausalLM):
    """Runs out of memory after its head."""

    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        raise torch.OutOfMemoryError


def test_out_of_memory_is_no_fault_of_the_model():
    model, heads = Full(model_of("qwen2").config), ChunkedHead(TokenLogprobs(Agreement()))
    ids = torch.randint(1, VOCABULARY, (1, 5))
    heads.prepare(model)
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=ids, **{HEAD: Sealed(TokenQuestion(None, ids.flatten()))})
    assert heads.fault(model) == ""
    assert not {"forward", "model", "lm_head"} & vars(model).keys()


@pytest.mark.parametrize("how", ["another tensor beside its weight", "a weight of several parts"])
def test_a_head_that_computes_with_its_weight_alone(how):
    model = model_of("qwen2")
    if how == "a weight of several parts":
        nn.utils.parametrizations.weight_norm(model.lm_head)
    else:
        model.lm_head.seen = torch.randn(VOCABULARY)
    compare(run(model, True), run(model, False), 3e-5)


def test_what_cannot_run_so_is_told_before():
    heads = ChunkedHead(TokenLogprobs(Agreement()))
    model = model_of("qwen2")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 32, dtype=torch.int8), requires_grad=False)
    assert heads.fault(model) == "its lm_head is quantised"
    assert heads.fault(model_of("qwen2").model) == "it has no head of its own"
    model = model_of("qwen2")
    model.lm_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, VOCABULARY))
    assert heads.fault(model.train()) == "its lm_head has a dropout"
    model.lm_head = nn.Linear(32, VOCABULARY)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    assert heads.fault(model) == "other code has a hook on its lm_head"
    handle.remove()
    model.forward = lambda **kwargs: None
    model.lm_head = nn.Linear(32, VOCABULARY)
    assert heads.fault(model) == "other code has replaced its forward"


class Memory:
    """A device with so much memory left."""

    def __init__(self, free):
        self.free = free

    def available(self):
        return self.free


def chosen(monkeypatch, setting, model, free):
    """Return what the feature answers for 1,000 rows, and what it tells of it."""
    monkeypatch.setattr(feature_module, "device_memory", lambda: Memory(free))
    feature = feature_module.Head(Settings.of(head=setting))
    feature.start()
    try:
        asked = TokenQuestion(None, torch.zeros(1000, device="meta"))
        return events.head.ask(model, asked, 1000, 2), feature.describe()["models"]
    finally:
        feature.stop()
        vars(model).pop("forward", None)


def test_auto_goes_without_logits_only_where_they_would_not_fit(monkeypatch, caplog):
    model, size = model_of("qwen2", torch.bfloat16).to("meta"), 1000 * VOCABULARY * 2
    assert chosen(monkeypatch, "auto", model, 2 * size) == (False, {})
    assert not caplog.records
    assert chosen(monkeypatch, "auto", model, 2 * size - 1) == (
        True,
        {"Qwen2ForCausalLM": "chunked: its logits, 0.0 GB, would not fit"},
    )
    assert len(caplog.records) == 1
    assert chosen(monkeypatch, "chunked", model, 2 * size)[0]


def test_auto_asks_nothing_that_a_model_may_not_tell(monkeypatch):
    """Omni models have several embeddings, and raise where they are asked for theirs."""
    model = model_of("qwen2").to("meta")
    model.get_input_embeddings = lambda: 1 / 0
    assert chosen(monkeypatch, "auto", model, 1_000_000) == (False, {})


def test_a_model_that_cannot_is_told_under_auto_and_refused_under_chunked(monkeypatch):
    model = model_of("qwen2").to("meta")
    model.forward = print
    answer, told = chosen(monkeypatch, "auto", model, 0)
    assert not answer
    assert told == {"Qwen2ForCausalLM": "logits: other code has replaced its forward"}
    model.forward = print
    with pytest.raises(HeadError, match="VERL_FL_HEAD=chunked: Qwen2ForCausalLM cannot: other code has replaced"):
        chosen(monkeypatch, "chunked", model, 0)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    import torch.distributed as distributed

    store = distributed.HashStore()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    distributed.destroy_process_group()


def test_fsdp1_does_not_round_the_temperature(one_rank):
    """It casts what it finds in the inputs of a model; 0.7 would become 0.69921875 in bf16."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    model, heads = model_of("qwen2"), ChunkedHead(computer := TokenLogprobs(Agreement()))
    types = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = FullyShardedDataParallel(model, mixed_precision=types, device_id=torch.device("cpu"))
    ids = torch.randint(1, VOCABULARY, (1, 11))
    asked = TokenQuestion(None, ids.flatten(), torch.full((1, 11), 0.7))
    heads.prepare(model)
    with torch.no_grad():
        ours = sharded(input_ids=ids, **{HEAD: Sealed(asked)})["log_probs"]
        native = computer(replace(asked, logits=sharded(input_ids=ids).logits)).log_probs
    assert float((ours - native.flatten()).abs().max()) < 1e-5


def test_a_head_that_fsdp1_shards_by_itself_makes_its_logits(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, heads = model_of("qwen2"), ChunkedHead(TokenLogprobs(Agreement()))
    model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"))
    assert heads.fault(model) == "FSDP1 shards its lm_head by itself"
