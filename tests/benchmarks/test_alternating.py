"""The benchmark in turns: every row runs on what it is named for, also after Liger replaced the model's code."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("verl")

from processes import output, run, warm

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_tiny_model_s_rows_take_turns():
    done = run(BENCHMARKS / "alternating.py", "--rounds", "1", env={}, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout[done.stdout.index("model tiny") :].splitlines()
    assert [line[:16].strip() for line in table[1:5]] == ["row", "verl", "native", "log-probs only"]
    assert all(line.count("x") == 2 for line in table[2:5])


def test_a_native_row_is_native_after_liger_and_refused_if_it_is_not():
    program = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import types
        import verl
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from transformers.models.qwen2 import modeling_qwen2 as source
        from alternating import rows
        from verl_fl_overlay.kernels.agreement import Agreement

        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **sizes))
        make = rows(types.SimpleNamespace(module=model), Agreement())["native"]
        make()
        norm, mlp = source.Qwen2RMSNorm, source.Qwen2MLP

        class Other(norm):
            def forward(self, values):
                return values

        # What Liger does to a model and to the model's file.
        source.Qwen2RMSNorm = source.Qwen2MLP = Other
        model.model.norm.forward = types.MethodType(Other.forward, model.model.norm)
        make()
        assert source.Qwen2RMSNorm is norm and source.Qwen2MLP is mlp
        assert model.model.norm.forward.__func__ is norm.forward
        norm.forward = Other.forward
        try:
            make()
        except AssertionError as error:
            print(error)
    """
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_DEVICE": "cpu", "VERL_FL_FUSED": "0"}
    said = output(program, env=env, start=warm)
    assert said == "the model runs on ['__main__', 'transformers'], expected transformers"
