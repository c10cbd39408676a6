"""The benchmark of GRPO: who waits for whom, what is compared with what, and what verl is asked for.

tests/on_ray/test_turns.py runs it whole.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

from processes import run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "grpo.py"


@pytest.fixture
def imported(monkeypatch):
    """Return what imports a benchmark, whose folder has a grpo.py as that of the examples does."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    for name in ("grpo", "turns", "taught_model", "recipe", "realistic"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name):
        module = __import__(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    return load


def test_the_first_answer_of_a_turn_waits_and_the_others_behind_it(imported, tmp_path, monkeypatch):
    given = {"FOLDER": tmp_path, "RUN": "row", "ANSWERS": 2, "STEPS": 2, "PROCESS": os.getpid()}
    for name, value in given.items():
        monkeypatch.setenv(f"TURNS_{name}", str(value))
    turns = imported("turns").turns
    threads = []

    def answer(count):
        made = [threading.Thread(target=turns.answer, daemon=True) for _ in range(count)]
        threads.extend(made)
        for thread in made:
            thread.start()
        for thread in made:
            thread.join(0.3)
        return sum(thread.is_alive() for thread in threads)

    assert answer(2) == 2, "nobody goes on before the file is there"
    assert (tmp_path / "row.waits-0").exists()
    (tmp_path / "row.goes-0").touch()
    assert answer(2) == 0, "the second step of a turn does not wait"
    assert answer(2) == 2
    assert (tmp_path / "row.waits-1").exists()
    (tmp_path / "row.goes-1").touch()
    for thread in threads:
        thread.join(5)
    steps = [int(line.split()[0]) for line in (tmp_path / "row.answers").read_text().splitlines()]
    assert steps == [1, 2, 3]


class Fake:
    """A run whose turns are over as soon as they begin; it ends after ``turns`` of them."""

    def __init__(self, name, order, turns):
        self.name, self.order, self.left, self.turns = name, order, turns, 0
        self.run, self.plan, self.begun = SimpleNamespace(name=name), SimpleNamespace(total=9), 0.0

    @property
    def ended(self):
        return self.turns >= self.left

    def waits(self, turn):
        return self.ended or self.turns == turn

    def go(self, turn):
        self.order.append((self.name, turn))
        self.turns += 1

    def result(self):
        return {"error": "a run that is made up"}


def test_runs_take_turns_and_one_that_ended_early_holds_up_nobody(imported, capsys):
    grpo = imported("grpo")
    order = []
    runs = [Fake("a", order, 3), Fake("b", order, 1), Fake("c", order, 3), Fake("never starts", order, 0)]
    plan = grpo.Plan(Path(), "tiny", 1, 3, 3, False)
    grpo.take_turns(runs, plan, float("inf"))
    assert [name for name, _ in order] == ["a", "b", "c", "a", "c", "a", "c"]
    told = [line.split("s  ")[1].partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told[0] == "never starts"
    assert told.count("b") == 1


def result(row, variant="", reward=0.5, apart=1e-4, seconds=2.0, steps=4):
    step = {"reward": reward, "probability difference": apart, "entropy": 0.1, "update_actor": seconds, "tokens": 100.0}
    about = {"row": row, "variant": variant, "device": "a GPU", "versions": {"verl": "0.9.1"}, "model": "0.5B"}
    made = [{**step, "number": n, "counted": n > 1, "step": 9.0} for n in range(1, steps + 1)]
    return {**about, "steps": made, "asked steps": 4, "gpus": 1}


def test_a_row_is_compared_with_those_without_the_overlay_of_its_own_kind(imported, tmp_path):
    grpo = imported("grpo")
    results = {
        "overlay": result("overlay", seconds=1.0),
        "padded": result("padded", seconds=5.0),
        "overlay lora": result("overlay", "lora"),
        "flash-attn lora": result("flash-attn", "lora"),
        "flash-attn": {**result("flash-attn"), "error": "it fails"},
    }
    assert grpo.compared(results) == [("overlay", "padded"), ("overlay lora", "flash-attn lora")]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    done = run(SCRIPT, "--merge", file, env={})
    assert done.returncode == 0, done.stderr
    (ratio,) = [line for line in done.stdout.splitlines() if line.startswith("| overlay | padded |")]
    assert "| 5.00x |" in ratio
    assert any(line.startswith("| flash-attn | it fails |") for line in done.stdout.splitlines())


def test_what_is_not_like_the_row_without_the_overlay_is_named(imported):
    grpo = imported("grpo")
    base = {"padded": result("padded")}
    assert grpo.disagreements({"overlay": result("overlay"), **base}) == []
    wrong = {
        "rollout and actor differ": result("overlay", apart=2e-4),
        "the reward ends at": result("overlay", reward=0.1),
        "3 steps of 4": result("overlay", steps=3),
        "a problem": {**result("overlay"), "reports": 1, "problems": ["a problem"]},
        "it fails": {**result("overlay"), "error": "it fails"},
    }
    for said, one in wrong.items():
        (line,) = grpo.disagreements({"overlay": one, **base})
        assert said in line


def test_a_line_of_verls_logger_is_read(imported):
    line = (
        "(TaskRunnerV1 pid=1) step:3 - timing_s/gen:4.03 - critic/score/mean:0.5 - actor/entropy:np.float64(0.25)"
        " - rollout_corr/kl:-1e-05 - timing_s/step:9.5"
    )
    expected = {"number": 3, "gen": 4.03, "reward": 0.5, "entropy": 0.25, "kl": -1e-05, "step": 9.5}
    assert imported("grpo").metrics(line) == expected


def test_verl_is_asked_for_the_recipe_and_for_what_the_row_and_the_variant_add(imported):
    grpo = imported("grpo")
    plan = grpo.Plan(Path("/data"), "0.5B", 2, 3, 3, False)

    def asked(row, variant=""):
        return dict(line.split("=", 1) for line in grpo.overrides(grpo.Run(row, variant, Path("/run")), plan))

    overlay, padded = asked("overlay"), asked("padded", "critic")
    assert overlay["actor_rollout_ref.actor.use_kl_loss"] == "True"
    assert overlay["trainer.n_gpus_per_node"] == "2"
    assert overlay["trainer.total_training_steps"] == "9"
    assert "actor_rollout_ref.model.use_remove_padding" not in overlay
    assert padded["actor_rollout_ref.model.use_remove_padding"] == padded["critic.model.use_remove_padding"] == "False"
    assert padded["critic.model.path"] == "/data/model"
    assert padded["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] == padded["critic.ppo_max_token_len_per_gpu"]


def test_rows_and_variants_that_are_not_there_are_refused():
    for option in ("--rows", "--variants"):
        done = run(SCRIPT, option, "nothing", env={})
        assert done.returncode == 2
        assert f"no such {option[2:]}: nothing; there are " in done.stderr


def test_a_lesson_teaches_the_answers_alone_and_fits_the_limits(imported):
    taught = imported("taught_model")
    from arithmetic import tokenizer

    for name in ("0.5B", "tiny"):
        size = taught.SIZES[name]
        tokens, labels = taught.lesson(tokenizer(), size, seed=0)
        told = labels != -100
        assert (tokens[told] == labels[told]).all()
        answers, asked = told.sum(1), told.int().argmax(1)
        assert int(answers.max()) <= size.longest
        assert 0 < int(asked.min()) <= int(asked.max()) <= size.prompt
