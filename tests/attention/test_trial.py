"""The trial that a model keeps packed sequences apart, on models made for it: what it finds, and what it says then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from verl_fl_overlay.errors import AttentionInputError, PackingError  # noqa: E402
from verl_fl_overlay.events import failures, packed_model  # noqa: E402
from verl_fl_overlay.features.attention import Attention  # noqa: E402
from verl_fl_overlay.kernels.packing import PER_RANK, NoOutputError, fault  # noqa: E402
from verl_fl_overlay.kernels.sequences import PackedModel  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402


class Averages(torch.nn.Module):
    """A model whose output is the mean of the embeddings of what a token sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(100, 8)

    def get_input_embeddings(self):
        return self.embedding


def of_its_sequence(ids, ends):
    """Return (tokens, tokens) of which token sees which: those before it in its own sequence."""
    number = torch.bucketize(torch.arange(ids.shape[1]), torch.tensor(ends), right=True)
    return (number[:, None] == number[None, :]).tril()


def averaged(model, ids, seen):
    weights = seen / seen.sum(1, keepdim=True)
    return (weights @ model.embedding(ids[0])).unsqueeze(0)


def sound(model, ids, ends):
    return averaged(model, ids, of_its_sequence(ids, ends))


def leaking(model, ids, ends):
    return averaged(model, ids, torch.ones(ids.shape[1], ids.shape[1]).tril())


def leaking_a_little(model, ids, ends):
    found = sound(model, ids, ends)
    return found + 0.005 * found.roll(1, 1)


def by_place(model, ids, ends):
    return sound(model, ids, ends) + torch.arange(ids.shape[1])[:, None]


def noisy(model, ids, ends):
    found = sound(model, ids, ends)
    return found * (1 + 1e-4 * torch.rand_like(found))


def cut(model, ids, ends):
    ranks = torch.arange(ids.shape[1]) // PER_RANK
    return averaged(model, ids, of_its_sequence(ids, ends) & (ranks[:, None] == ranks[None, :]))


def silent(model, ids, ends):
    return torch.zeros(1, ids.shape[1], 1)


def made(run, rank=0, ranks=1, attention="flash_attention_2", told=True, dtype=torch.float32, **config):
    model = Averages()

    def forward(ids, ends):
        return run(model, ids, ends)[:, rank * PER_RANK : (rank + 1) * PER_RANK].to(dtype)

    config = SimpleNamespace(image_token_id=3, **config)
    return PackedModel(model, config, torch.device("cpu"), forward, attention, told, rank, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_it_finds(dtype):
    assert fault(made(sound, dtype=dtype)) == ""
    assert "changes with the one before it" in fault(made(leaking, dtype=dtype))
    assert "changes with its place" in fault(made(by_place, dtype=dtype))


def test_a_small_leak_is_found_and_noise_is_none():
    assert "changes with the one before it" in fault(made(leaking_a_little))
    assert fault(made(noisy)) == ""


@pytest.mark.parametrize(("run", "found"), [(sound, ""), (cut, "does not change with the token before it")])
def test_sequences_over_two_ranks(run, found):
    assert fault(made(run, rank=0, ranks=2)) == ""
    assert found in (fault(made(run, rank=1, ranks=2)) or "")


def test_each_rank_runs_it_as_often():
    def times(run, rank):
        calls = []
        fault(made(lambda *given: calls.append(1) or run(*given), rank=rank, ranks=2))
        return len(calls)

    assert {times(run, rank) for run in (sound, leaking, cut) for rank in (0, 1)} == {4}


def test_attention_in_chunks_of_the_batch():
    assert "every 8192 tokens" in fault(made(sound, attention="sdpa", attention_chunk_size=8192))
    assert fault(made(sound, attention_chunk_size=8192)) == ""


def test_special_tokens_are_left_out():
    seen = set()
    fault(made(lambda model, ids, ends: seen.update(ids.flatten().tolist()) or sound(model, ids, ends)))
    assert 3 not in seen
    assert max(seen) < 100


def test_outputs_of_zeros_tell_nothing():
    with pytest.raises(NoOutputError):
        fault(made(silent))


@pytest.fixture
def feature():
    feature = Attention(Settings.of(device="cpu"))
    feature.start()
    yield feature
    feature.stop()
    failures.begin(strict=False)


def told(feature):
    return feature.describe()["packed models"]


def test_a_sound_model_is_tried_once_for_each_attention(feature):
    calls = []
    model = made(lambda *given: calls.append(1) or sound(*given))
    for attention, runs in (("flash_attention_2", 3), ("flash_attention_2", 3), ("sdpa", 6)):
        packed_model.ask(PackedModel(model.model, model.config, model.device, model.forward, attention, True))
        assert len(calls) == runs
    assert told(feature) == {f"Averages, {name}": "keeps them apart" for name in ("flash_attention_2", "sdpa")}


def test_a_refusal_names_the_model_the_setting_and_the_way_out(feature):
    with pytest.raises(PackingError) as caught:
        packed_model.ask(made(leaking, attention="sdpa", told=False))
    assert str(caught.value).startswith("Averages, sdpa mixes packed sequences")
    assert "attn_implementation=flash_attention_2" in str(caught.value)
    assert "use_remove_padding=False" in str(caught.value)
    with pytest.raises(PackingError) as caught:
        packed_model.ask(made(leaking))
    assert "attn_implementation=" not in str(caught.value), "it has that already"


def broken(model, ids, ends):
    raise KeyError("vocab_size")


def test_a_model_that_cannot_be_tried_is_refused_unless_it_is_told_the_lengths(feature):
    with pytest.raises(PackingError, match="could not be tried on packed sequences: KeyError: 'vocab_size'"):
        packed_model.ask(made(broken, attention="sdpa", told=False))
    packed_model.ask(made(broken))
    assert "could not be tried" in told(feature)["Averages, flash_attention_2"]
    assert list(failures.told()) == ["the trial of packed sequences in Averages, flash_attention_2"]


def test_an_error_of_the_overlay_is_told_as_it_is(feature):
    def refused(model, ids, ends):
        raise AttentionInputError("8 sinks and 4 heads")

    with pytest.raises(AttentionInputError, match="8 sinks"):
        packed_model.ask(made(refused))


def test_zeros_are_tried_again(feature):
    head = [silent]
    model = made(lambda *given: head[0](*given))
    packed_model.ask(model)
    assert told(feature) == {"Averages, flash_attention_2": "not tried yet: its outputs are all 0"}
    head[0] = leaking
    with pytest.raises(PackingError):
        packed_model.ask(model)
