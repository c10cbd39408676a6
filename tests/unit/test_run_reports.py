"""``doctor --reports``: the processes of a run, summed up."""

from __future__ import annotations

import json

import pytest
from processes import PLAIN, run

from verl_fl_overlay.cli import main, run_reports
from verl_fl_overlay.errors import OverlayError


def report(program="workers/default_worker.py", rank=None, calls=0, problems=(), **features):
    hooks = [
        {"name": "engine.enter", "state": "installed", "calls": calls, "required": True},
        {"name": "logprobs.fsdp", "state": "installed", "calls": 0, "required": False},
        {"name": "flagcx.process_group", "state": "disabled", "calls": 0, "required": True},
    ]
    return {
        "verl": {"version": "0.9.1"},
        "process": {"program": program, "rank": rank},
        "phase": {"counts": {"train": calls} if calls else {}},
        "hooks": hooks,
        "features": {name: {"on": on} for name, on in features.items()},
        "problems": list(problems),
    }


@pytest.fixture
def folder(tmp_path):
    reports = [
        report("trainer/main_ppo.py", logprobs=True),
        *(report(rank=str(rank), calls=5 + rank, logprobs=True, flaggems=False) for rank in (0, 1, 2, 10)),
        report(rank="4", calls=1, problems=["FlagGems failed"], logprobs=True, flaggems=False),
    ]
    for number, content in enumerate(reports):
        (tmp_path / f"host-{number}.json").write_text(json.dumps(content))
    return tmp_path


def test_processes_that_did_the_same_are_one_row(folder, capsys):
    assert main(["doctor", "--wide", "--reports", str(folder)]) == 1, "a process has a problem"
    text = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[:4] == [
        "processes ranks verl training hooks called problems program and its features",
        "1 - 0.9.1 no 0 of 2 0 trainer/main_ppo.py: logprobs",
        "4 0-2,10 0.9.1 yes 1 of 2 0 workers/default_worker.py: logprobs",
        "1 4 0.9.1 yes 1 of 2 1 workers/default_worker.py: logprobs",
    ]
    assert "5 34 engine.enter" in rows
    assert "FlagGems failed (1 of the processes)" in rows


def test_a_note_is_told_and_no_problem(tmp_path, capsys):
    for rank in (0, 1):
        told = {**report(rank=str(rank), calls=2), "notes": ["a relative path"]}
        (tmp_path / f"{rank}.json").write_text(json.dumps(told))
    assert main(["doctor", "--reports", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("no problems") :] == [
        "no problems",
        "",
        "notes",
        "  a relative path (2 of the processes)",
    ]


def test_a_required_hook_that_nobody_called_is_told_and_no_fault(tmp_path, capsys):
    """SFT without validation infers nothing."""
    trained = report(rank="0", calls=2)
    trained["hooks"].append({"name": "engine.infer_batch", "state": "installed", "calls": 0, "required": True})
    (tmp_path / "a.json").write_text(json.dumps(trained))
    assert main(["doctor", "--reports", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "and called in no process: engine.infer_batch" in text
    assert "no process trained" not in text


def test_a_run_in_which_no_process_trained_proves_nothing(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(report("trainer/main_ppo.py")))
    assert main(["doctor", "--reports", str(tmp_path)]) == 1
    assert "no process trained with the overlay" in capsys.readouterr().out


@pytest.mark.parametrize("process", [{"rank": "\u00b2"}, {"rank": None}, {"rank": ["0"]}, {}])
def test_a_rank_that_is_no_number_is_none(tmp_path, process):
    (tmp_path / "a.json").write_text(json.dumps({**report(), "process": process}))
    (row,) = run_reports.summed_up(str(tmp_path))["processes"]
    assert row["ranks"] == "-"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"process": {}}', "\xff", "[" * 100_000], ids=range(6))
def test_a_file_that_is_no_report(folder, content, capsys):
    (folder / "other.json").write_bytes(content.encode("latin-1"))
    assert main(["doctor", "--json", "--reports", str(folder)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert sum(row["processes"] for row in result["processes"]) == 6
    (told,) = [problem for problem in result["problems"] if problem.startswith("other.json is no report")]
    assert "\n" not in told


def test_no_reports_at_all(tmp_path, capsys):
    with pytest.raises(OverlayError, match="holds no report"):
        run_reports.summed_up(str(tmp_path / "gone"))
    assert main(["doctor", "--reports", str(tmp_path)]) == 2
    assert "VERL_FL_REPORT_DIR" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["doctor", "--reports", str(tmp_path)]) == 2
    assert "is exported; other.json is no report of verl-fl-overlay: KeyError" in capsys.readouterr().err


def test_a_real_report_is_one(tmp_path):
    (tmp_path / "verl.py").write_text("__version__ = '0.9.1'\nimport verl_fl_overlay")
    import verl_fl_overlay

    here = str(verl_fl_overlay.__path__[0]).rpartition("/")[0]
    env = {
        **PLAIN,
        "PYTHONPATH": f"{tmp_path}:{here}",
        "VERL_FL_DISABLE": "*",
        "VERL_FL_REPORT_DIR": str(tmp_path / "r"),
    }
    assert run("-c", "import verl", env=env).returncode == 0
    done = run("-m", "verl_fl_overlay", "doctor", "--reports", tmp_path / "r", "--json", env=env)
    assert done.returncode == 1, "it only imported verl"
    result = json.loads(done.stdout)
    assert (result["trained"], result["problems"]) == (False, {})
    (row,) = result["processes"]
    assert (row["processes"], row["program"], row["training"]) == (1, "-c", "no")
    assert len(list((tmp_path / "r").iterdir())) == 1, "doctor itself reports nothing there"
