"""The benchmark of verl's real configuration runs on a CPU with a tiny model; nothing is said about time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

from processes import before_others, output, run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "realistic.py"
STAND_IN = before_others(BENCHMARKS / "flash_attn_stand_in")


@pytest.fixture
def realistic(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import realistic

    return realistic


ROWS = ("packed flash-attn", "padded", "padded overlay", "packed overlay", "packed overlay lengths not passed")
SHARES_THE_ROWS = pytest.mark.xdist_group("rows")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run the tiny benchmark; return what it printed and what it wrote.  flash-attn does not run on a CPU."""
    file = tmp_path_factory.mktemp("rows") / "result.json"
    command = (SCRIPT, "--size", "tiny", "--turns", "1", "--steps", "2", "--rows", ",".join(ROWS), "--json", file)
    return run(*command, env={}, timeout=500), json.loads(file.read_text())


@SHARES_THE_ROWS
def test_padded_rows_agree_with_and_without_the_overlay_and_their_ratio_is_printed(measured):
    done, results = measured
    (native,), (overlay,) = results["padded"], results["padded overlay"]
    assert overlay["first step"] == pytest.approx(native["first step"], rel=1e-4)
    assert all(len(overlay[measure]["steps ms"]) == 2 for measure in ("train", "train with entropy", "ref", "old"))
    (ratio,) = [line for line in done.stdout.splitlines() if line.startswith("| padded overlay | padded |")]
    assert ratio.count("x") == 4  # train and passes, without and with entropy


@SHARES_THE_ROWS
def test_packed_sequences_without_flash_attn_train_as_padded_ones_do(measured):
    _, results = measured
    first = {row: runs[0]["first step"] for row, runs in results.items() if row in ROWS[2:]}
    assert first["packed overlay"] == pytest.approx(first["padded overlay"], rel=1e-4)
    assert first["packed overlay lengths not passed"] == pytest.approx(first["padded overlay"], rel=1e-4)


@SHARES_THE_ROWS
def test_a_row_that_cannot_run_says_so_in_a_line_and_the_others_go_on(measured):
    done, results = measured
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("packed flash-attn: ")]
    assert "None" in line
    assert set(results["packed flash-attn"][0]) == {"error"}
    assert results["padded"][0]["first step"]["loss"] > 0


def test_results_of_several_runs_are_put_together_and_what_did_not_fit_is_told(tmp_path):
    def result(ms):
        figures = {"ms": ms, "busy ms": ms / 2, "launches": 10, "peak GB": 31.24}
        measures = {"train": figures, "ref": figures, "old": {"error": "out of memory"}, "train with entropy": figures}
        about = {"device": "a GPU", "batch": "a batch", "versions": {"verl": "0.9.1"}}
        return {**measures, **about, "first step": {"loss": 0.5, "grad_norm": 2.0}}

    files = tmp_path / "1.json", tmp_path / "2.json"
    files[0].write_text(json.dumps({"padded": [result(8000)], "packed overlay": [result(900)]}))
    files[1].write_text(json.dumps({"packed overlay": [result(1100)], "padded overlay": [{"error": "it fails"}]}))
    done = run(SCRIPT, "--merge", *files, env={})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        "| packed overlay | 1,000 / 1,000 | 500 / 500 | 10 / 10 | 1,000 / out of memory | 31.2 / 31.2 | 0.5, 2 |"
        in lines
    )
    assert "| padded overlay | it fails | | | | | |" in lines
    assert "| packed overlay | padded | 8.00x / 8.00x | 8.00x / 8.00x | 1.00x / 1.00x | 8.00x / - | train 7x |" in lines
    for what in ("device", "batch"):
        files[1].write_text(json.dumps({"packed overlay": [{**result(1100), what: "another"}]}))
        done = run(SCRIPT, "--merge", *files, env={})
        assert done.returncode == 2
        assert f"the files are of a {'GPU' if what == 'device' else 'batch'} and of another" in done.stderr


def test_rows_whose_loss_differs_are_named(realistic):
    results = {row: [{"first step": {"loss": loss}}] for row, loss in (("a", 1.0), ("b", 1.0005), ("c", 1.002))}
    results["d"] = [{"error": "it fails"}]
    assert [line[0] for line in realistic.disagreements(results)] == ["c", "d"]


def test_a_measure_that_does_not_fit_is_told_and_no_other_error_is_hidden(realistic):
    def fail(said):
        raise RuntimeError(said)

    assert realistic.fitting(lambda: fail("CUDA out of memory. Tried to allocate")) == {"error": "out of memory"}
    with pytest.raises(RuntimeError, match="shape"):
        realistic.fitting(lambda: fail("shape"))


def test_a_row_that_is_not_there_is_refused():
    done = run(SCRIPT, "--size", "tiny", "--rows", "padded,packt", env={})
    assert done.returncode == 2
    assert "no such rows: packt; there are padded, " in done.stderr


def test_the_batch_is_the_one_that_the_benchmark_tells_of(realistic):
    lengths = realistic.REAL.lengths()
    totals = [sum(both) for both in lengths]
    assert (len(lengths), sum(totals), max(totals)) == (32, 41221, 3838)


def test_the_stand_in_is_taken_for_flash_attn_and_differentiates_attention_of_grouped_heads():
    program = """
        import torch
        from transformers.utils import import_utils
        import_utils.is_torch_cuda_available = lambda: True
        assert import_utils.is_flash_attn_2_available() and not import_utils.is_flash_attn_4_available()
        from transformers.modeling_flash_attention_utils import _lazy_imports
        dense, packed, *_ = _lazy_imports("flash_attention_2")
        for function, shape, more in (
            (dense, (1, 10), ()),
            (packed, (10,), (*[torch.empty(3, dtype=torch.int32, device="meta")] * 2, 6, 6)),
        ):
            q, k, v = (
                torch.empty(*shape, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
                for heads in (4, 2, 2)
            )
            result = function(q, k, v, *more, causal=True)
            assert result.shape == q.shape
            result.sum().backward()
            assert k.grad.shape == v.grad.shape == k.shape
        print("the same")
    """
    assert output(program, env=STAND_IN) == "the same"


def test_the_stand_in_s_padding_and_cross_entropy_are_right(tmp_path):
    pytest.importorskip("triton")
    program = """
        import torch
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        padded = torch.randn(2, 3, 4) * mask[..., None]
        tokens, where, starts, longest, lengths = unpad_input(padded, mask)
        assert starts.tolist() == [0, 2, 5] and lengths.tolist() == [2, 3] and longest == 3
        assert torch.equal(pad_input(tokens, where, 2, 3), padded)

        torch.manual_seed(0)
        values, labels = 5 * torch.randn(3, 20000), torch.tensor([0, 17000, 19999])  # more than one block of columns
        upstream = torch.randn(3)
        for inplace in (False, True):
            expected = values.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(expected, labels, reduction="none")
            loss.backward(upstream)
            logits = values.clone().requires_grad_()
            found, _ = cross_entropy_loss(logits, labels, inplace_backward=inplace)
            torch.testing.assert_close(found, loss)
            found.backward(upstream)
            torch.testing.assert_close(logits.grad, expected.grad)
            assert torch.equal(logits.detach(), values) != inplace
        print("the same")
    """
    env = {**STAND_IN, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    assert output(program, env=env) == "the same"
