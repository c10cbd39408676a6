"""``verl-fl parity``: the comparison on made-up runs, and the whole command on verl's real engine."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from processes import OVERLAY, run  # noqa: E402

from verl_fl_overlay.cli import parity  # noqa: E402

LARGEST = "log-prob, largest difference in bf16 units"
GROUP = "grad_norm of a.*.w, relative"
ONE = "grad_norm of one parameter at most ({}), relative"
MEAN = "log-prob, mean difference in bf16 units"
KL = "KL(native, overlay), estimated by k3"


FROM_FP32 = (
    "log-prob, largest distance from fp32 in bf16 units",
    "log-prob, mean distance from fp32 in bf16 units",
    "KL(fp32, overlay), estimated by k3",
)

LOSS = "loss, distance from fp32, relative"


def a_run(shift=0.0, **changes):
    log_probs = torch.linspace(-9, -1, 100) + shift
    made = {"log_probs": log_probs, "entropy": torch.full((100,), 4.0), "loss": 2.0, "grad_norm": 3.0}
    return {**made, "grad_norms": norms(), **changes}


def norms(layers=(1.0,) * 24, b=0.0):
    return {**{f"a.{number}.w": norm for number, norm in enumerate(layers)}, "b": b}


def verdicts(ours, again=None):
    compared = parity.compare(a_run(), again or a_run(), ours, a_run())
    return {line.name: line.holds for line in compared}


def of_native(found):
    return {name for name in found if "fp32" not in name}


def test_equal_runs_hold_everywhere():
    assert all(verdicts(a_run()).values())


@pytest.mark.parametrize(
    ("ours", "failing"),
    [
        (a_run(grad_norms=norms([1.1] * 24)), {GROUP}),
        # Cut in one layer of 24: a fiftieth of the group's norm.
        (a_run(grad_norms=norms([1.0] * 7 + [0.0] + [1.0] * 16)), {ONE.format("a.7.w")}),
        (a_run(grad_norms=norms(b=0.6)), {"grad_norm of b, relative", ONE.format("b")}),
        (a_run(shift=0.05), {LARGEST, MEAN, KL}),
        (a_run(shift=0.1 * (torch.arange(100) == 99)), {LARGEST}),  # one token
        (a_run(shift=0.6 * parity._unit(torch.linspace(-9, -1, 100))), {MEAN}),  # every token, by a little
        (a_run(grad_norm=float("nan")), {"grad_norm, relative"}),
    ],
)
def test_what_differs_is_named_and_nothing_else(ours, failing):
    found = {name for name, holds in verdicts(ours).items() if not holds}
    assert of_native(found) == failing
    assert len(found - failing) == len(failing & {LARGEST, MEAN, KL}), "as far from fp32, which is the native run here"


@pytest.mark.parametrize(
    ("ours", "native", "failing"),
    [
        (a_run(shift=0.05), a_run(shift=-0.05), set()),  # as far as verl itself
        (a_run(shift=0.065), a_run(shift=-0.05), {"KL(fp32, overlay), estimated by k3"}),
        (a_run(shift=0.4), a_run(shift=-0.05), set(FROM_FP32)),
        (a_run(loss=2.1), a_run(), {LOSS}),
        (a_run(), a_run(loss=2.1), set()),  # verl's own loss was rounded
        (a_run(loss=2.1), a_run(loss=1.95), {LOSS}),
        (a_run(entropy=torch.full((100,), 4.1)), a_run(), {"entropy, mean distance from fp32, relative"}),
        (a_run(entropy=torch.full((100,), float("nan"))), a_run(), {"entropy, mean distance from fp32, relative"}),
    ],
)
def test_a_packed_run_beside_a_padded_one_is_compared_with_fp32(ours, native, failing):
    lines = parity.compare(native, native, ours, a_run(), alike=False)
    assert not {LARGEST, MEAN, KL} & {line.name for line in lines}
    assert {line.name for line in lines if not line.holds} == failing


def test_what_verl_s_own_rounding_explains_is_allowed_for_tokens_of_any_probability():
    exact = a_run(log_probs=-torch.logspace(-3, 2, 1000))
    rounded = a_run(log_probs=exact["log_probs"].bfloat16().float())
    lines = {line.name: line for line in parity.compare(rounded, rounded, exact, exact)}
    assert all(line.holds for line in lines.values())
    assert lines[LARGEST].difference > 0.4  # of half a unit


def test_native_s_own_noise_is_allowed_for():
    ours = a_run(grad_norm=3.3)
    assert not verdicts(ours)["grad_norm, relative"]
    assert verdicts(ours, again=a_run(grad_norm=3.2))["grad_norm, relative"]
    assert not verdicts(ours, again=a_run(grad_norm=3.05))["grad_norm, relative"]


def test_a_parameter_that_is_noise_hides_none_that_was_cut():
    """Of a bias whose gradient is rounding two native runs differ by 40 %, and the overlay by more than all of it."""
    native = a_run(grad_norms=norms(b=1.0))
    cut = a_run(grad_norms=norms([1.0] * 7 + [0.0] + [1.0] * 16, b=2.1))
    lines = {line.name: line.holds for line in parity.compare(native, a_run(grad_norms=norms(b=1.4)), cut, a_run())}
    assert lines.pop(ONE.format("a.7.w")) is False
    assert all(lines.values())


def test_a_gradient_that_is_not_a_number_is_the_worst():
    lines = verdicts(a_run(grad_norms=norms([1.0] * 3 + [float("nan")] + [0.0] + [1.0] * 19)))
    assert lines[ONE.format("a.3.w")] is False


def test_k3_is_the_divergence_of_ratios():
    one, other = torch.randn(1000, dtype=torch.float64) / 10, torch.zeros(1000, dtype=torch.float64)
    found = float(parity._k3(one - other))
    assert found == pytest.approx(float((one.exp() - 1 - one).mean()))
    assert found > 0


def test_json_has_null_for_what_is_no_number():
    assert json.loads(parity.as_json([float("inf"), {"a": float("nan")}, 1.5, "NaN"])) == [
        None,
        {"a": None},
        1.5,
        "NaN",
    ]


def told(model, *options):
    command = ("-m", "verl_fl_overlay", "parity", model, "--rows", "2", "--length", "24", "--json", *options)
    done = run(*command, env=OVERLAY, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["same"] is True
    return result, {line["name"]: line for line in result["lines"]}


def test_the_command_runs_what_verl_runs_by_default(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path)
    result, lines = told(tmp_path)
    assert result["overlay"]["logprobs"]["kernels"] == {"cpu, bfloat16, entropy": "torch"}
    assert list(result["overlay"]["attention"]["backends"]) == ["cpu, bfloat16, heads of 16, causal"]
    assert result["native"] == {"attention": "eager", "padding": True}
    assert LARGEST not in lines
    assert 0 < lines[FROM_FP32[0]]["difference"] < lines[FROM_FP32[0]]["noise"]  # verl's are rounded to bf16 there
    assert lines[LOSS]["difference"] < lines[LOSS]["noise"]  # a sum in bf16
    assert lines["entropy, mean distance from fp32, relative"]["noise"] > 0
    assert "grad_norm of model.layers.*.mlp.gate_proj.weight, relative" in lines
    assert any(name.startswith(ONE.partition("(")[0]) and "model.layers." in name for name in lines)


def test_padded_it_is_compared_with_native_too(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path)
    _, lines = told(tmp_path, "--attention", "sdpa", "--padding")
    assert lines[LARGEST]["noise"] == 0
    assert lines[LARGEST]["difference"] > 0  # verl's are rounded to bf16 there, ours are not


def test_without_an_accelerator_the_way_to_the_cpu_is_told(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path)
    done = run("-m", "verl_fl_overlay", "parity", tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=200)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("to compare on the CPU, export VERL_FL_DEVICE=cpu")


def test_a_vision_language_model_is_compared_on_text(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import tokenizer
    from attention.packed_models import build

    build("qwen2_5_vl", "eager").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    result, lines = told(tmp_path)
    assert result["overlay"]["attention"]["packed models"]
    assert any("visual" in name for name in lines)


def test_a_model_that_cannot_be_loaded_is_an_error_and_no_verdict(tmp_path):
    pytest.importorskip("verl")
    from arithmetic import write_model

    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    done = run("-m", "verl_fl_overlay", "parity", tmp_path, env=OVERLAY, timeout=200)
    assert done.returncode == 2
    assert "the engine failed, exit status 1" in done.stderr
