"""Ranks, and worker groups that both have a rank 0, never share a tuning database."""

from __future__ import annotations

import subprocess
import sys

from verl_fl_overlay.flaggems import database

CLAIM = """
import sys
from pathlib import Path
from verl_fl_overlay.flaggems import database
print(database._claim(Path(sys.argv[1])).name, flush=True)
sys.stdin.read()
"""


def claiming(folder, rank):
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        env={"RANK": rank},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_two_live_processes_with_one_rank_get_two_files_and_the_next_run_finds_the_first(tmp_path):
    first, name = claiming(tmp_path, "0")
    second, other = claiming(tmp_path, "0")
    third, different = claiming(tmp_path, "1")
    assert (name, other, different) == ("rank0.db", "rank0.1.db", "rank1.db")
    for process in (first, second, third):
        process.communicate("")
    later, again = claiming(tmp_path, "0")
    later.communicate("")
    assert again == "rank0.db"


def test_a_file_system_without_locks_gets_a_file_by_process(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(database.fcntl, "flock", no_locks)
    monkeypatch.setenv("RANK", "2")
    assert database._claim(tmp_path).name == f"rank2-{database.os.getpid()}.db"


def test_the_variable_is_there_for_the_import_only_and_a_users_own_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(database, "folder", lambda: tmp_path)
    monkeypatch.delenv(database.VARIABLE, raising=False)
    with database.own_database() as ours:
        assert ours
        assert database.os.environ[database.VARIABLE].startswith(f"sqlite:///{tmp_path}")
    assert database.VARIABLE not in database.os.environ
    monkeypatch.setenv(database.VARIABLE, "sqlite:///mine.db")
    with database.own_database() as ours:
        assert not ours
        assert database.os.environ[database.VARIABLE] == "sqlite:///mine.db"
    assert database.os.environ[database.VARIABLE] == "sqlite:///mine.db"
