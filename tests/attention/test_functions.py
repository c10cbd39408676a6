"""flash-attn's two functions as transformers calls them, and what of its options is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attention.reference import error, expected, packed, random_case  # noqa: E402
from verl_fl_overlay.compat.transformers_attention import dense, varlen  # noqa: E402
from verl_fl_overlay.errors import OverlayError  # noqa: E402
from verl_fl_overlay.features.attention import Attention  # noqa: E402
from verl_fl_overlay.kernels.sequences import ANY, Form  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402


@pytest.fixture
def feature():
    made = Attention(Settings.of(device="cpu"))
    made.start()
    yield made
    made.stop()


def test_varlen(feature):
    query, key, value, upstream = random_case(20, 20, 4, 2, 16)
    sequences = packed([7, 0, 13])
    found = varlen(query, key, value, sequences.ends_q.long(), sequences.ends_k, torch.tensor(13), 13, causal=True)
    assert error(found, expected(query, key, value, upstream, sequences, Form(0.25))[0]) < 1e-6


def test_dense_with_a_cache_and_options(feature):
    """One new token beside ten old ones, as in generation."""
    query, key, value, upstream = random_case(3, 33, 4, 2, 16)
    options = {"causal": True, "window_size": (5, 5), "softcap": 2.0, "softmax_scale": 0.5}
    found = dense(query.view(3, 1, 4, 16), key.view(3, 11, 2, 16), value.view(3, 11, 2, 16), **options)
    form = Form(0.5, window=(5, 5), softcap=2.0)
    exact = expected(query, key, value, upstream, packed([1] * 3, [11] * 3), form)[0]
    assert found.shape == (3, 1, 4, 16)
    assert error(found.view(3, 4, 16), exact) < 1e-6


def test_a_negative_side_is_no_limit(feature):
    query, key, value, _ = random_case(9, 9, 2, 2, 16)
    ends = packed([9]).ends_q
    found, whole = (varlen(query, key, value, ends, ends, 9, 9, window_size=w) for w in ((-2, -1), (ANY, ANY)))
    assert torch.equal(found, whole)


def test_dropout_is_refused(feature):
    query, key, value, _ = random_case(9, 9, 2, 2, 16)
    ends = packed([9]).ends_q
    with pytest.raises(OverlayError, match=r"no dropout, and the model asks for 0\.1: set attention_dropout=0"):
        varlen(query, key, value, ends, ends, 9, 9, dropout_p=0.1)


def test_off_is_told():
    query, key, value, _ = random_case(9, 9, 2, 2, 16)
    ends = packed([9]).ends_q
    with pytest.raises(OverlayError, match="verl-fl-overlay is off"):
        varlen(query, key, value, ends, ends, 9, 9)


def test_rehearsal_tells_the_backend(feature):
    feature.rehearse()
    (told,) = feature.describe()["backends"].values()
    assert told.startswith("SDPA, one sequence at a time")
    feature.stop()
    assert feature.describe()["backends"] == {}
