"""What TransformerEngine-FL's implementations get wrong, by functions that do as its source does: mended or refused."""

# ruff: noqa: N803 - the names of TransformerEngine

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from verl_fl_overlay.compat import te_fl  # noqa: E402
from verl_fl_overlay.errors import MegatronError  # noqa: E402
from verl_fl_overlay.kernels.te_operators import trials  # noqa: E402

TYPES = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}
PRODUCTS = [trial for trial in trials(torch.device("cpu"), TYPES) if trial.operator == "generic_gemm"]
OF_BIAS = [trial for trial in PRODUCTS if "db" in trial.name]


def reference_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, size: int, accumulate: bool, split: bool,
    alpha: float = 1.0, beta: float | None = None,
) -> Any:  # fmt: skip
    """Compute as the reference does: a bias is added, in the backward pass too."""
    out = (B.T if transB else B) @ (A.T if transA else A)
    out = out if bias is None else out + bias
    if D is not None:
        out = D.add_(out) if accumulate else D.copy_(out)
    return out, None, None, None


def flagos_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, size: int, accumulate: bool, split: bool,
    alpha: float = 1.0, beta: float | None = None,
) -> Any:  # fmt: skip
    """Compute as flagos' of December 2025 does: no bias."""
    assert bias is None
    return reference_gemm(
        A, transA, B, transB, D, quantizer, output_dtype, None, *[None] * 3, grad, None, 0, accumulate, split
    )


def hooked(wrapper: Any, function: Any) -> Any:
    return lambda *args, **kwargs: wrapper(function, None, args, kwargs)


def outcome(trial: Any, gemm: Any) -> float:
    try:
        return float(trial.distance(gemm))
    except (AssertionError, RuntimeError):
        return float("nan")


@pytest.mark.parametrize("gemm", [reference_gemm, flagos_gemm])
@pytest.mark.parametrize("trial", OF_BIAS, ids=lambda trial: trial.name)
def test_by_itself_a_bias_gets_no_gradient(trial: Any, gemm: Any) -> None:
    assert not outcome(trial, gemm) <= 1


@pytest.mark.parametrize(
    ("wrapper", "gemm"), [(te_fl._gemm, reference_gemm), (te_fl._flagos_gemm, flagos_gemm)], ids=["reference", "flagos"]
)
@pytest.mark.parametrize("trial", PRODUCTS, ids=lambda trial: trial.name)
def test_with_the_hook_every_product_is_right(trial: Any, wrapper: Any, gemm: Any) -> None:
    assert outcome(trial, hooked(wrapper, gemm)) <= 1


def test_a_gradient_is_also_added_in_fp32_as_megatron_has_it() -> None:
    def overwrites(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(reference_gemm).bind(*args, **kwargs)
        into = given.arguments["D"]
        given.arguments["accumulate"] &= into is not None and into.dtype != torch.float32
        return reference_gemm(*given.args, **given.kwargs)

    wrong = [trial.name for trial in PRODUCTS if "db" not in trial.name and not outcome(trial, overwrites) <= 1]
    assert wrong == ["dW, added fp32, 64 to 48", "dW, added fp32, 64 to 64"]


def test_a_flagos_product_that_takes_a_bias_is_left_alone() -> None:
    given = []

    def newer(*args: Any, bias: Any) -> str:
        given.append(bias)
        return "its own"

    assert hooked(te_fl._flagos_gemm, newer)(1, bias=2) == "its own"
    assert given == [2]


ADAM = {"tensor_lists": [[]] * 4, "mode": 1, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, ""),
        ({"mode": 0, "weight_decay": 0.0}, ""),
        ({"tensor_lists": [[]] * 5}, "use_precision_aware_optimizer"),
        ({"mode": 0}, "decoupled_weight_decay=False"),
    ],
    ids=str,
)
def test_an_adam_that_would_step_wrongly_is_refused(asked: Any, said: str) -> None:
    def multi_tensor_adam_fl(tensor_lists: Any, mode: int, weight_decay: float) -> str:
        return "stepped"

    call = hooked(te_fl._adam, multi_tensor_adam_fl)
    if said:
        with pytest.raises(MegatronError, match=said):
            call(**{**ADAM, **asked})
    else:
        assert call(**{**ADAM, **asked}) == "stepped"


class Older:
    """An attention of TransformerEngine-FL that overrides ``forward``; it tells what it was asked for."""

    def forward(
        self, query_layer: Any, qkv_layout: str = "sbh3d", cu_seqlens_q: Any = None, cu_seqlens_kv: Any = None,
        attn_mask_type: str = "causal", window_size: Any = None, alibi_slopes: Any = None,
    ) -> Any:  # fmt: skip
        return qkv_layout, cu_seqlens_q, cu_seqlens_kv


class Newer(Older):
    _forward_impl = Older.forward


def attend(owner: type, kind: str, gradient: bool = False, **asked: Any) -> Any:
    cls = type(owner.__name__, (owner,), {"__module__": f"{te_fl.BACKENDS}.{kind}.attention"})
    instance = cls()
    query = torch.ones(2, 2, 2, 2, requires_grad=gradient)
    return te_fl._flash(instance.forward, instance, (query,), {"qkv_layout": "sbhd_sbhd_sbhd", **asked})


@pytest.mark.parametrize("kind", ["flagos", "reference"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attn_mask_type": "padding_causal"}, "a mask of type padding_causal"),
        ({"attn_mask_type": "arbitrary"}, "a mask of type arbitrary"),
        ({"window_size": (16, 0)}, r"a window of \(16, 0\)"),
        ({"alibi_slopes": 1}, "slopes of ALiBi"),
        ({"qkv_layout": "thd_thd_thd"}, "the layout thd"),
        ({"qkv_layout": "bshd_bshd_bshd"}, "the layout bshd"),
    ],
    ids=str,
)
def test_attention_that_would_leave_something_out_is_refused(kind: str, asked: Any, said: str) -> None:
    with pytest.raises(MegatronError, match=said):
        attend(Older, kind, **asked)


def test_causal_sequences_of_one_length_are_not_given_as_packed() -> None:
    ends = torch.tensor([0, 2, 4])
    asked = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "window_size": (-1, 0)}
    assert attend(Older, "reference", **asked) == ("sbhd", None, None), "its look-up knows layouts of one word"
    assert attend(Older, "flagos", **asked) == ("sbhd_sbhd_sbhd", None, None)


def test_a_flagos_attention_that_refuses_by_itself_is_left_alone() -> None:
    assert attend(Newer, "flagos", attn_mask_type="padding_causal")[0] == "sbhd_sbhd_sbhd"
    with pytest.raises(MegatronError):
        attend(Newer, "reference", attn_mask_type="padding_causal")


@pytest.mark.parametrize("owner", [Older, Newer])
@pytest.mark.parametrize(
    ("kind", "version", "gradient", "refused"),
    [
        ("flagos", "5.3.0", True, True),
        ("flagos", "0.1.0", True, True),
        ("flagos", "5.3.1", True, False),
        ("flagos", "5.3.0", False, False),
        ("reference", "5.3.0", True, False),
    ],
)
def test_flaggems_wrong_gradient_of_attention_is_refused(
    monkeypatch: Any, owner: Any, kind: str, version: str, gradient: bool, refused: bool
) -> None:
    monkeypatch.setitem(sys.modules, "flag_gems", SimpleNamespace(__version__=version))
    if refused:
        with pytest.raises(MegatronError, match=rf"flag_gems {version}.*issues/3395.*5.3.1 or newer"):
            attend(owner, kind, gradient)
    else:
        assert attend(owner, kind, gradient)[0].startswith("sbhd")


class Core:
    """Megatron's attention layer on TransformerEngine, as far as the hook looks."""

    def __init__(self, kind: str, **more: Any) -> None:
        module = f"{te_fl.BACKENDS}.{kind}.attention" if kind else "transformer_engine.pytorch.attention"
        flash = type("Flash", (), {"__module__": module, "softmax_scale": 0.25})
        self.flash_attention = flash()
        self.training, self.attention_dropout, self.window_size = True, 0.0, None
        self.config = SimpleNamespace(context_parallel_size=1)
        self.__dict__.update(more)

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, attn_mask_type: Any,
                attention_bias: Any = None, packed_seq_params: Any = None, num_splits: Any = None) -> Any:  # fmt: skip
        return "TransformerEngine's", attention_mask


LENGTHS = (5, 3)
CAUSAL = SimpleNamespace(name="causal")


def packed(core: Core, kind: Any = CAUSAL, monkeypatch: Any = None) -> Any:
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    params = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None,
        max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS), local_cp_size=None,
    )  # fmt: skip
    torch.manual_seed(0)
    given = [torch.randn(sum(LENGTHS), 2, 8) for _ in range(3)]
    return given, te_fl._forward(core.forward, core, (*given, None, kind), {"packed_seq_params": params})


@pytest.fixture
def attention() -> Any:
    from verl_fl_overlay.events import packed_attention
    from verl_fl_overlay.kernels.agreement import Agreement
    from verl_fl_overlay.kernels.attention import PackedAttention

    end = packed_attention.answer(PackedAttention(Agreement()))
    yield
    end()


@pytest.mark.parametrize("kind", ["flagos", "reference"])
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_packed_sequences_are_what_each_gives_alone(attention: None, kind: str, window: Any) -> None:
    (query, key, value), found = packed(Core(kind, window_size=window))
    for part, rows in zip(
        found.split(LENGTHS), zip(*(t.split(LENGTHS) for t in (query, key, value)), strict=True), strict=True
    ):
        q, k, v = (row.transpose(0, 1) for row in rows)
        apart = torch.arange(len(part))[:, None] - torch.arange(len(part))
        seen = (apart >= 0) & (apart <= (window or (len(part), 0))[0])
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.25)
        assert torch.allclose(part, alone.transpose(0, 1).flatten(1), atol=1e-5)


def test_a_vendors_attention_gets_them_itself(attention: None) -> None:
    for kind in ("", "vendor.cuda"):
        assert packed(Core(kind))[1] == ("TransformerEngine's", None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attention_dropout": 0.5}, "attention_dropout=0.5 in training"),
        ({"config": SimpleNamespace(context_parallel_size=2)}, "context_parallel_size=2"),
    ],
    ids=str,
)
def test_packed_sequences_that_it_cannot_compute_are_refused(attention: None, more: Any, said: str) -> None:
    with pytest.raises(MegatronError, match=f"{said}. By TransformerEngine-FL's own implementations"):
        packed(Core("flagos", **more))


def test_verls_mask_of_a_padded_batch_is_left_to_the_causal_one() -> None:
    core, rows = Core("flagos"), torch.ones(2, 4, dtype=torch.bool)
    call = lambda mask, kind: te_fl._forward(core.forward, core, (1, 2, 3, mask, kind), {})[1]  # noqa: E731
    assert call(rows, CAUSAL) is None
    assert call(rows[None, None], CAUSAL) is not None
    assert call(rows, SimpleNamespace(name="padding")) is rows
