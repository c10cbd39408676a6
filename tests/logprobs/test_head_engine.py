"""VERL_FL_HEAD=chunked in verl's real engines on a CPU: the numbers are those of all logits, which never exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import OVERLAY, result, warm

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

PROGRAM = Path(__file__).parents[1] / "real_engine.py"
CHUNKED = {**OVERLAY, "VERL_FL_HEAD": "chunked"}
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "lm_head"]}


def numbers(model, env, *options, cases="lm:fsdp2,lm:fsdp,value:fsdp2", hf=None, ranks=1):
    fields = ["--hf", json.dumps(hf or {}), "--steps", "2"]
    command = (PROGRAM, model, "--cases", cases, *fields, *options)
    return result(*command, env=env, start=warm, ranks=ranks, timeout=600)


def decoded(run):
    steps = [float.fromhex(step[name]) for step in run["steps"] for name in ("loss", "grad_norm")]
    return steps + [float.fromhex(value) for value in run["values"]]


def compare(ours, native, cases):
    told = ours["report"]["features"]["head"]["detail"]
    assert told["models"] == {"Qwen2ForCausalLM": "chunked: VERL_FL_HEAD=chunked"}
    assert set(told["kernels"].values()) == {"torch"}
    assert native["report"]["features"]["head"]["detail"] == {"models": {}, "kernels": {}}
    for case in cases:
        assert decoded(ours[case]) == pytest.approx(decoded(native[case]), rel=0.01, abs=0.01)  # they compute in bf16


@pytest.mark.parametrize(
    ("tied", "options"), [(False, ("--packed",)), (True, ())], ids=["packed, untied", "padded, tied"]
)
def test_engines_train_without_all_logits(tmp_path, tied, options):
    from arithmetic import write_model

    write_model(tmp_path, tie_word_embeddings=tied)
    ours, native = (numbers(tmp_path, env, *options) for env in (CHUNKED, OVERLAY))
    compare(ours, native, ["lm:fsdp2", "lm:fsdp"])
    assert ours["value:fsdp2"] == native["value:fsdp2"], "a critic has no such head"


def test_an_adapter_on_the_head_trains_or_is_refused_by_name(tmp_path):
    from arithmetic import write_model

    write_model(tmp_path, tie_word_embeddings=True)
    ours, native = (numbers(tmp_path, env, "--packed", cases="lm:fsdp2", hf=LORA) for env in (CHUNKED, OVERLAY))
    compare(ours, native, ["lm:fsdp2"])
    arguments = [PROGRAM, tmp_path, "--cases", "lm:fsdp", "--hf", json.dumps(LORA), "--packed"]
    refused = warm(*arguments, env=CHUNKED, timeout=300)
    assert "Qwen2ForCausalLM cannot: FSDP shards parts of its lm_head by themselves" in refused.stderr


def test_two_ranks_that_share_a_model(tiny_model):
    ours, native = (
        numbers(tiny_model, env, "--packed", cases="lm:fsdp2,lm:fsdp", ranks=2) for env in (CHUNKED, OVERLAY)
    )
    compare(ours, native, ["lm:fsdp2", "lm:fsdp"])


def test_an_engine_that_makes_logits_is_refused_by_name(tmp_path):
    program = """
    from verl_fl_overlay import activation, events
    for engine in (events.Engine("megatron"), events.Engine("fsdp", legacy=True)):
        try:
            events.engine_initialized.emit(engine)
        except RuntimeError as error:
            print(type(error).__name__, error)
    events.engine_initialized.emit(events.Engine("fsdp"))
    """
    done = warm("-c", "import verl\n" + "\n".join(line[4:] for line in program.splitlines()), env=CHUNKED)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first.startswith("SettingsError VERL_FL_HEAD=chunked: verl's megatron engine makes all logits")
    assert "legacy fsdp worker" in second


def test_a_model_that_does_not_tell_its_size_makes_its_logits(monkeypatch):
    """auto asks about every model; one that cannot answer trains as before."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.utils import tensordict_utils

    from verl_fl_overlay import events
    from verl_fl_overlay.compat.model_outputs import inputs_hook
    from verl_fl_overlay.kernels.tokens import HEAD

    class FSDPEngineWithLMHead:
        engine_config, ulysses_sequence_parallel_size = None, 1
        module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen2", vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        )

        def prepare_model_inputs(self, micro_batch):
            ids = micro_batch["input_ids"].values()
            return {"input_ids": ids[None]}, {"input_ids_rmpad_rolled": ids.roll(-1)}

        def prepare_model_outputs(self):
            pass

    def unusual(*asked):
        raise AttributeError("no vocab_size")

    monkeypatch.setattr(events, "failures", failures := events.Failures())
    monkeypatch.setattr("verl_fl_overlay.compat.packing.failures", failures)
    ids = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(2)], layout=torch.jagged)
    batch = tensordict_utils.get_tensordict({"input_ids": ids}, {"temperature": 1.0})
    engine, answers = FSDPEngineWithLMHead(), []
    for answer in (lambda *asked: True, unusual):
        end = events.head.answer(answer)
        try:
            answers.append(inputs_hook().wrapper(engine.prepare_model_inputs, engine, (batch,), {})[0])
        finally:
            end()
    assert [HEAD in given for given in answers] == [True, False]
    assert list(failures.told().values()) == ["AttributeError: no vocab_size"]
