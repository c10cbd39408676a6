"""megatron-core's real attention on a CPU, with the overlay on: what packed sequences give; prints JSON.

Megatron itself computes the same sequences one at a time.  "cases" are the largest differences of output and
gradients, "refused" the errors.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from on_cpu import CpuForCuda, answer_for_cuda

LENGTHS, SIZE = (5, 1, 9, 3), 8


def attention(kind: str, layer: int = 1, **config: Any) -> Any:
    """Return the attention of one layer, with weights that training would have changed."""
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {"num_layers": 4, "hidden_size": 4 * SIZE, "num_attention_heads": 4, "num_query_groups": 2}
    given = TransformerConfig(**{**defaults, "attention_dropout": 0.0, "masked_softmax_fusion": False, **config})
    given.sequence_parallel = True  # else dropout asks for a generator of random numbers
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    made = DotProductAttention(given, layer, getattr(AttnMaskType, kind), "self", pg_collection=groups)
    if given.softmax_type == "learnable":
        with torch.no_grad():
            made.softmax_offset.copy_(torch.randn(4))
    return made


def qkv() -> list[Any]:
    import torch

    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, SIZE) for heads in (4, 2, 2)]


def ends(lengths: tuple[int, ...]) -> Any:
    import torch

    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths: tuple[int, ...] = LENGTHS, **fields: Any) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    where = ends(lengths)
    given = {"qkv_format": "thd", "cu_seqlens_q": where, "cu_seqlens_kv": where, **fields}
    return PackedSeqParams(**{"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths), **given})


def with_gradients(core: Any, compute: Any, tokens: list[Any], seen: Any = slice(None)) -> list[Any]:
    """Return the output and the gradients of query, key, value and sinks, of a sum that tells all outputs apart."""
    import torch

    inputs = [tensor.clone().requires_grad_() for tensor in tokens]
    out = compute(*inputs).reshape(len(tokens[0]), -1)[seen]
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    sinks = [p for p in core.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad((out * weights).sum(), [*inputs, *sinks])]


def difference(core: Any, tokens: list[Any] | None = None, params: Any = None, **options: Any) -> float:
    """Return how far packed sequences are from the same ones alone."""
    import torch

    def alone(*whole: Any) -> Any:
        parts = zip(*(tensor.split(LENGTHS) for tensor in whole), strict=True)
        return torch.cat([core(*(part[:, None] for part in one), None)[:, 0] for one in parts])

    def together(*whole: Any) -> Any:
        return core(*whole, None, packed_seq_params=params or packed(), **options)

    found, expected = with_gradients(core, together, tokens or qkv()), with_gradients(core, alone, qkv())
    return max(float((a.reshape(b.shape) - b).abs().max()) for a, b in zip(found, expected, strict=True))


def padding_is_not_seen(core: Any) -> float:
    """Return the difference of real tokens where each sequence has garbage behind it, as verl pads for tensor parallel.

    The gradient of the garbage must be 0.
    """
    import torch

    lengths = tuple(length + 2 for length in LENGTHS)
    real = torch.cat([torch.arange(n + 2) < n for n in LENGTHS])
    padded = [torch.full((sum(lengths), *tensor.shape[1:]), 7.0) for tensor in qkv()]
    for whole, tensor in zip(padded, qkv(), strict=True):
        whole[real] = tensor
    where = ends(lengths)
    worst = 0.0
    for params in (
        packed(cu_seqlens_q_padded=where, cu_seqlens_kv_padded=where),
        packed(lengths, cu_seqlens_q_padded=where, cu_seqlens_kv_padded=where),
    ):
        found = with_gradients(core, lambda *x, p=params: core(*x, None, packed_seq_params=p), padded, real)
        whole = with_gradients(core, lambda *x: core(*x, None, packed_seq_params=packed()), qkv())
        for got, expected in zip(found, whole, strict=True):
            inner = got[real] if len(got) == len(real) else got
            worst = max(worst, float((inner - expected).abs().max()))
        worst = max(worst, *(float(gradient[~real].abs().max()) for gradient in found[1:4]))
    return worst


def longest_with_padding() -> float:
    """Return how far the longest sequence that is told is from the longest with padding, by which a kernel reads."""
    from verl_fl_overlay.compat.megatron_attention import _sequences

    where = ends(tuple(length + 2 for length in LENGTHS))
    told = _sequences(packed(cu_seqlens_q_padded=where, cu_seqlens_kv_padded=where), causal=True)
    return float(abs(told.longest_q - max(LENGTHS) - 2) + abs(told.longest_k - max(LENGTHS) - 2))


def a_padded_batch(core: Any) -> float:
    """Return the difference that verl's mask of a padded batch makes to the real tokens: none, they see no padding."""
    import torch

    batch = [torch.randn(6, 2, heads, SIZE) for heads in (4, 2, 2)]
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    return float((core(*batch, mask) - core(*batch, None)).abs().max())


def cases() -> dict[str, float]:
    causal = attention("causal")
    one_row = [tensor[:, None] for tensor in qkv()]
    scaled = {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}
    window = {"window_size": (2, 0), "window_attn_skip_freq": 2}
    dropped = attention("causal", attention_dropout=0.5).eval()
    from megatron.core.transformer.enums import AttnMaskType

    return {
        "causal": difference(causal),
        "one row": difference(causal, one_row),
        "padding_causal": difference(causal, attn_mask_type=AttnMaskType.padding_causal),
        "no lengths": difference(causal, params=packed(max_seqlen_q=None, max_seqlen_kv=None)),
        "no_mask": difference(attention("no_mask")),
        "softmax_scale": difference(attention("causal", softmax_scale=0.7)),
        "layer scaling": difference(attention("causal", 3, **scaled)),
        "window": difference(attention("causal", 1, **window)),
        "no window in this layer": difference(attention("causal", 2, **window)),
        "off-by-one": difference(attention("causal", softmax_type="off-by-one")),
        "learnable": difference(attention("causal", softmax_type="learnable")),
        "dropout in evaluation": difference(dropped),
        "padding": padding_is_not_seen(causal),
        "longest with padding": longest_with_padding(),
        "padded batch": a_padded_batch(causal),
    }


def error(call: Any) -> str:
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def refused() -> dict[str, str]:
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.enums import AttnMaskType

    def of(core: Any, params: Any = None, **options: Any) -> str:
        return error(lambda: core(*qkv(), None, packed_seq_params=params or packed(), **options))

    def layers(**fields: Any) -> str:
        config = attention("causal").config
        for name, value in fields.items():
            setattr(config, name, value)
        return error(lambda: get_gpt_decoder_block_spec(config, use_transformer_engine=True))

    causal, parallel, bare = attention("causal"), attention("causal"), attention("causal")
    parallel.config.context_parallel_size = 2
    del bare.softmax_scale
    longer = ends(tuple(length + 1 for length in LENGTHS))
    padding = {"cu_seqlens_q_padded": longer, "cu_seqlens_kv_padded": longer}
    return {
        "arbitrary": of(causal, attn_mask_type=AttnMaskType.arbitrary),
        "bias": of(causal, attention_bias=torch.zeros(1)),
        "dropout": of(attention("causal", attention_dropout=0.5).train()),
        "context parallel": of(parallel),
        "dynamic context parallel": of(causal, packed(local_cp_size=2)) if hasattr(packed(), "local_cp_size") else "",
        "padding that is seen": of(attention("no_mask"), packed(**padding)),
        "other keys": of(causal, packed(cu_seqlens_kv=longer)),
        "no ends": of(causal, packed(cu_seqlens_q=None)),
        "unknown Megatron": of(bare),
        "bshd": of(causal, packed(qkv_format="sbhd")),
        "experts": layers(num_moe_experts=4, expert_tensor_parallel_size=2),
        "latent": layers(multi_latent_attention=True),
        "layers context parallel": layers(context_parallel_size=2),
    }


if __name__ == "__main__":
    answer_for_cuda()
    with CpuForCuda():
        import verl  # noqa: F401
        from megatron.core import parallel_state

        parallel_state._set_global_memory_buffer()
        if "--one" in sys.argv:
            core = attention("causal")
            once = error(lambda: core(*qkv(), None, packed_seq_params=packed()))
            print("RESULT " + json.dumps({"refused": {"causal": once}}))
        else:
            print("RESULT " + json.dumps({"cases": cases(), "refused": refused()}))
