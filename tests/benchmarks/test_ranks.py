"""The benchmark of two GPUs runs on two CPU ranks with a tiny model; nothing is said about time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("verl")

from processes import PLAIN, output, run, warm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "ranks.py"
SHARES_THE_RANKS = pytest.mark.xdist_group("ranks")
NAMES = ("fsdp2", "ulysses")


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    import ranks

    return ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run the tiny benchmark; return what it printed and what it wrote."""
    file = tmp_path_factory.mktemp("ranks") / "result.json"
    command = (SCRIPT, "--tiny", "--steps", "4", "--configurations", ",".join(NAMES), "--json", file)
    return run(*command, env={}, timeout=500), json.loads(file.read_text())


@SHARES_THE_RANKS
def test_every_step_has_plain_verls_numbers(measured):
    done, results = measured
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        ours, plain = results["overlay"][name], results["plain"][name]
        assert len(ours["loss"]) == len(ours["steps ms"]) == 4
        assert len(set(ours["loss"])) == 4, "each step has another batch, and changes the weights"
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.count("(1.0e-04)") for row in rows] == [0, 2, 2]


@SHARES_THE_RANKS
def test_ranks_that_share_sequences_compute_what_those_compute_that_share_the_batch(measured):
    """So the batch is split without a loss, and the ranks' losses are put together as the trainer would."""
    _, results = measured
    data_parallel, ulysses = (results["plain"][name] for name in NAMES)
    assert data_parallel["loss"] == pytest.approx(ulysses["loss"], rel=1e-4)
    assert data_parallel["grad_norm"] == pytest.approx(ulysses["grad_norm"], rel=1e-4)


def result(loss, grad_norm=2.0, ms=100.0):
    numbers = {"loss": [loss] * 5, "grad_norm": [grad_norm] * 5, "tokens": [1000] * 5}
    about = {"device": "a GPU", "versions": {"verl": "0.9.1"}, "peak GB": [3.25, 3.5]}
    return {**numbers, **about, "steps ms": [9e9, 9e9, 9e9, ms, ms]}


def test_the_bound_is_twice_what_bf16_does_to_plain_verl_and_what_is_beyond_it_is_named(ranks):
    plain = {"fsdp2 in fp32": result(1.0), "fsdp2": result(1.001), "hsdp": result(1.0005), "dp2": result(1.0)}
    overlay = {"fsdp2": result(1.0029), "hsdp": result(1.0029), "dp2": result(1.0, grad_norm=2.2)}
    results = {"plain": plain, "overlay": overlay}
    assert ranks.bounds(results, "hsdp", tiny=False) == pytest.approx((2e-3, 0))
    assert ranks.bounds(results, "dp2", tiny=False) == (ranks.LOSS, ranks.GRAD_NORM)
    assert ranks.bounds(results, "dp2", tiny=True) == (ranks.EXACT, ranks.EXACT)
    wrong = ranks.disagreements(results, tiny=False)
    assert [line.split(" differs")[0] for line in wrong] == ["hsdp: loss", "dp2: grad_norm"]


@pytest.mark.parametrize("side", ["plain", "overlay"])
@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize("step", range(5))
def test_a_number_that_is_none_is_no_agreement(ranks, side, what, step):
    results = {"plain": {"fsdp2": result(1.0)}, "overlay": {"fsdp2": result(1.0)}}
    assert ranks.disagreements(results, tiny=False) == []
    results[side]["fsdp2"][what][step] = float("nan")
    assert ranks.disagreements(results, tiny=False)


def test_what_dies_is_told_in_a_line_and_the_others_go_on_in_new_processes(ranks, monkeypatch, capsys):
    asked = []

    def torchrun(names, *_):
        asked.append(names)
        done = {name: result(1.0) for name in names[: names.index("tp2")]} if "tp2" in names else dict.fromkeys(names)
        return done, "it hangs"

    monkeypatch.setattr(ranks, "torchrun", torchrun)
    until = time.monotonic() + 60
    found = ranks.together(["dp2", "tp2", "pp2"], "plain", Path(), 1, True, until)
    assert asked == [["dp2", "tp2", "pp2"], ["pp2"]]
    assert found["tp2"] == {"error": "it hangs"}
    late = ranks.together(["dp2"], "plain", Path(), 1, True, time.monotonic() - 1)
    assert late == {"dp2": {"error": "not run: no time was left"}}


def test_scaling_is_told_by_tokens_a_second(tmp_path):
    two = {"two GPUs, same batch": {"error": "it fails"}, "two GPUs, twice the batch": result(1.0, ms=105.0)}
    two["two GPUs, twice the batch"]["tokens"] = [2000] * 5
    files = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "3.json"
    files[0].write_text(json.dumps({"overlay": {"one GPU": result(1.0)}}))
    files[1].write_text(json.dumps({"overlay": two}))
    files[2].write_text(json.dumps({"overlay": {"one GPU": {"error": "no time left"}}}))  # a result stays
    done = run(SCRIPT, "--merge", *files, env={})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "| one GPU, overlay | 100 | 10,000 | - | 3.2 / 3.5 |" in lines
    assert "| two GPUs, same batch, overlay | it fails | | | |" in lines
    assert "| two GPUs, twice the batch, overlay | 105 | 19,048 | 1.90x | 3.2 / 3.5 |" in lines
    files[0].write_text(json.dumps({"overlay": {"one GPU": {**result(1.0), "device": "another GPU"}}}))
    done = run(SCRIPT, "--merge", *files, env={})
    assert done.returncode == 2
    assert "the files are of a GPU and of another GPU; their times cannot be compared" in done.stderr


@pytest.mark.parametrize(
    ("option", "named", "said"),
    [
        ("--configurations", "fsdp2,fsdp3", "no such configurations: fsdp3; there are fsdp2 in fp32, fsdp2, "),
        ("--modes", "plain,overlaid", "no such modes: overlaid; there are plain, overlay"),
    ],
)
def test_what_is_not_there_is_refused(option, named, said):
    done = run(SCRIPT, "--tiny", option, named, env={})
    assert done.returncode == 2
    assert said in done.stderr


def test_the_plain_side_is_without_the_overlay():
    """Its programs import it nowhere, which would load it."""
    program = f"""
        import sys
        sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(ROOT / "tests" / "gpu")!r}]
        import ranks, realistic, megatron_engine, verl
        print("verl_fl_overlay" in sys.modules, megatron_engine.te_fl())
    """
    assert output(program, start=warm, env=PLAIN) == "False False"


@pytest.mark.parametrize(
    ("allowed", "taken"), [(None, ["0", "0,1"]), ("2,3", ["2", "2,3"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-a,GPU-b"])]
)
def test_only_devices_that_its_user_allows_are_taken(ranks, monkeypatch, allowed, taken):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    used = [
        ranks.environment("overlay", ranks.CONFIGURATIONS[name], tiny=False)["CUDA_VISIBLE_DEVICES"]
        for name in ("one GPU", "two GPUs, same batch")
    ]
    assert used == taken
