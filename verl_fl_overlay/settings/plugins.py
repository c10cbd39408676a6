"""FlagOS' plugins for rollout, vllm-plugin-FL and sglang-plugin-FL: what each is called, and what it reads.

They have the same kinds of lists and policies under different names, so one description a plugin serves the settings,
the check of its file and the feature.  Their versions tell little (both have said 0.1.0 for a year), so what depends on
the version is read from the installed source, as text: importing a plugin takes seconds and needs a chip.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verl_fl_overlay.packages import folders, source

CONFIG_FOLDER = "dispatch/config"
"""Where a plugin has a configuration file for each chip, in its package."""


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    ``prefix`` begins its variables, ``switch`` is its engine's list of plugins, and ``entry`` is its name in that list.
    ``platform`` is the engine's variable that chooses one platform plugin, "" if there is none.  ``hooks`` are the
    overlay's hooks on it.  ``file_first`` tells whether its configuration file takes the place of the variables of the
    policy.  ``keys`` are those of its configuration file.  ``replaced`` are the engine's operators that its newest
    version replaces, ``dispatched`` the operators for which it chooses an implementation, and ``table`` is the file
    with the table of the former.
    """

    name: str
    engine: str
    package: str
    prefix: str
    switch: str
    entry: str
    platform: str
    hooks: tuple[str, ...]
    file_first: bool
    keys: tuple[str, ...]
    table: str
    replaced: tuple[str, ...]
    dispatched: tuple[str, ...]

    @property
    def config(self) -> str:
        """The variable with the path of a configuration file."""
        return f"{self.prefix}CONFIG"

    @property
    def lists(self) -> dict[str, str]:
        """The variables that the plugin takes in place of a list of its configuration -> that list's key."""
        return {f"{self.prefix}{key.upper()}": key for key in ("flagos_blacklist", "oot_blacklist")}

    def reads_lists_from_file(self) -> bool:
        """Return whether the lists in the file of ``config`` count.

        In sglang-plugin-FL they always do.  vllm-plugin-FL, until August 2026 at least, used the chip's own file for
        its lists whatever the variable said.
        """
        text = source(f"{self.package}/{CONFIG_FOLDER}/utils.py")
        if not text or not self.file_first:
            return True
        nodes = ast.walk(_tree(text))
        return any(self.config in _texts(n) for n in nodes if isinstance(n, ast.FunctionDef) and n.name == _FINDS)

    def replaced_here(self) -> frozenset[str]:
        """Return the operators that the installed plugin replaces; none if that cannot be told."""
        return frozenset(_of_tables(source(f"{self.package}/{self.table}") or "", "OOT_OPS", "_BRIDGE_MAP"))

    def dispatched_here(self) -> frozenset[str]:
        """Return the names that the installed plugin's registrations have; none if that cannot be told."""
        found: set[str] = set()
        for folder in folders(self.package):
            for file in Path(folder, "dispatch/backends").rglob("register_ops.py"):
                tree = _tree(file.read_text(encoding="utf-8", errors="replace"))
                found.update(filter(str.isidentifier, _texts(tree)))
        others = _of_tables(source(f"{self.package}/__init__.py") or "", "_CLASS_TO_OP") if found else ()
        return frozenset({*found, *others})


_FINDS = "get_config_path"
"""The plugins' function that finds the file with the lists."""


def _tree(text: str) -> ast.AST:
    with contextlib.suppress(SyntaxError):  # written for another Python
        return ast.parse(text)
    return ast.Module([], [])


def _texts(tree: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _of_tables(text: str, *tables: str) -> Iterator[str]:
    """Yield the keys of the dictionaries with these names, and the texts that code looks for in a list.

    vllm-plugin-FL's newest versions replace ``fused_moe`` by hand, unless it is in the list.
    """
    for node in ast.walk(_tree(text)):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in tables for target in targets):
                yield from (ast.unparse(key).strip("'") for key in node.value.keys if key)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            yield from filter(str.isidentifier, _texts(node.left))


VLLM = Plugin(
    name="vllm-plugin-FL",
    engine="vLLM",
    package="vllm_fl",
    prefix="VLLM_FL_",
    switch="VLLM_PLUGINS",
    entry="fl",
    platform="",
    hooks=("rollout.lists",),
    file_first=True,
    keys=(
        "prefer",
        "strict",
        "allow_vendors",
        "deny_vendors",
        "op_backends",
        "flagos_blacklist",
        "flagos_whitelist",
        "oot_blacklist",
        "action",
        "io_dump",
    ),
    table="ops/custom_ops.py",
    replaced=(
        "silu_and_mul",
        "gelu_and_mul",
        "silu_and_mul_with_clamp",
        "rms_norm",
        "rotary_embedding",
        "fused_moe",
        "unquantized_fused_moe_method",
        "gated_layer",
        "deepseek_v4_multi_head_latent_attention",
    ),
    dispatched=(
        "apply_rotary_emb",
        "attention_backend",
        "bf16_indexer_cache_write",
        "bf16_indexer_decode",
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "chunk_gated_delta_rule_fwd",
        "chunk_kda_with_safe_gate",
        "dynamic_per_token_quant_int8",
        "fused_gdn_gating",
        "fused_recurrent_gated_delta_rule_fwd",
        "gelu_and_mul",
        "grouped_topk",
        "invoke_fused_moe_triton_kernel",
        "mhc_fused_post_pre_with_norm",
        "mhc_post",
        "mhc_pre_with_norm",
        "moe_align_block_size",
        "moe_sum",
        "rms_norm",
        "rotary_embedding",
        "silu_and_mul",
        "silu_and_mul_with_clamp",
        "sparse_indexer_append_tail_to_topk",
        "sparse_indexer_expand_pools_to_tokens",
        "sparse_indexer_mqa_logits",
        "sparse_indexer_pack_seq",
        "sparse_indexer_rotate_indexer_query",
        "sparse_indexer_unpack_seq",
        "top_k_per_row_decode",
        "top_k_per_row_prefill",
        "topk_softmax",
    ),
)

SGLANG = Plugin(
    name="sglang-plugin-FL",
    engine="SGLang",
    package="sglang_fl",
    prefix="SGLANG_FL_",
    switch="SGLANG_PLUGINS",
    entry="sglang_fl",
    platform="SGLANG_PLATFORM",
    hooks=("rollout.sglang_lists", "rollout.sglang_platform"),
    file_first=False,
    keys=("prefer", "strict", "allow_vendors", "deny_vendors", "op_backends", "flagos_blacklist", "oot_blacklist"),
    table="__init__.py",
    replaced=(
        "SiluAndMul",
        "RMSNorm",
        "GemmaRMSNorm",
        "RotaryEmbedding",
        "MRotaryEmbedding",
        "TopK",
        "UnquantizedFusedMoEMethod",
    ),
    dispatched=(
        "chunk_gated_delta_rule",
        "fused_moe",
        "fused_recurrent_gated_delta_rule",
        "fused_recurrent_gated_delta_rule_packed_decode",
        "gemma_rms_norm",
        "mrotary_embedding",
        "rms_norm",
        "rotary_embedding",
        "silu_and_mul",
        "topk",
        "SiluAndMul",
        "RMSNorm",
        "RotaryEmbedding",
        "TopK",
        "UnquantizedFusedMoEMethod",
    ),
)

PLUGINS = (VLLM, SGLANG)

REPLACED_LISTS = tuple(name for plugin in PLUGINS for name in plugin.lists)
"""The variables that a plugin takes in place of a list in its configuration."""
