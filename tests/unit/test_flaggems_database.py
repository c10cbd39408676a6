"""Ranks, and worker groups that both have a rank 0, never share a tuning database."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

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


def test_a_forked_child_does_not_share_its_parents_file(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "folder", lambda: tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    database._file_of.cache_clear()
    arguments, of_the_child = ["/theirs.db"], ["/theirs.db"]
    database._connect(None, None, arguments, {})
    database._connect(None, None, arguments, {})
    monkeypatch.setattr(database.os, "getpid", lambda: -1)
    database._connect(None, None, of_the_child, {})
    assert (arguments, of_the_child) == ([str(tmp_path / "rank0.db")], [str(tmp_path / "rank0.1.db")])
    database._file_of.cache_clear()


def test_where_nothing_can_be_written_flaggems_keeps_its_own(tmp_path, monkeypatch, caplog):
    """A home that is read-only, or a full disk: FlagGems decides whether it can work there."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FLAGGEMS_CACHE_DIR", str(tmp_path / "taken"))
    monkeypatch.setattr(database, "chip_name", lambda: "a chip")
    database._file_of.cache_clear()
    arguments = ["/theirs.db"]
    database._connect(None, None, arguments, {})
    assert arguments == ["/theirs.db"]
    assert "no tuning database of this process's own" in caplog.text


@pytest.mark.parametrize(
    "libentry",
    [
        SimpleNamespace(),
        SimpleNamespace(libcache=SimpleNamespace(model=None)),
        SimpleNamespace(FLAGGEMS_DB_URL="sqlite:///mine.db", libcache=SimpleNamespace(model=SimpleNamespace(engine=1))),
        SimpleNamespace(libcache=SimpleNamespace(model=SimpleNamespace(engine=1, sql_model_pool={"tuned": 1}))),
    ],
)
def test_a_flaggems_without_a_database_a_users_own_and_one_in_use_are_left_alone(libentry):
    database._exchange(libentry)
