"""Every command in every bad situation: one or two lines that say what to do, a status that its help names.

Commands are found in the parser, and what each has to be given by the names of its arguments, so that a new command is
walked by itself.  Most of this runs where neither verl nor torch is installed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import commands
import pytest
from processes import clean_environment

import verl_fl_overlay
from verl_fl_overlay import cli
from verl_fl_overlay.cli import terminal, trial
from verl_fl_overlay.files import write_whole
from verl_fl_overlay.flaggems.profile import SHIPPED

bare = pytest.mark.skipif(
    any(map(find_spec, ("verl", "torch", "flag_gems"))), reason="is about a machine without verl, torch and FlagGems"
)
each_command = pytest.mark.parametrize("name", commands.COMMANDS)

PLAIN = {"VERL_FL_DEVICE": "cpu", "PYTHONUNBUFFERED": ""}  # what is written last fails only when it is flushed
HERE = Path(verl_fl_overlay.__file__).parents[1]

BROKEN = {
    "raises": {"__init__.py": "raise RuntimeError('no driver\\nhere')"},
    "cannot be parsed": {"__init__.py": "def ("},
    "has no readable version": {"__init__.py": "__version__ = 'banana'"},
    "is half deleted": {"__init__.py": "from verl.protocol import DataProto", "version/version": "0.9.1"},
    "is an empty folder": {"notes.txt": ""},
}
"""A verl that is here and cannot be used -> its files."""


def write_verl(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / "verl" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "verl" / name).write_text(text)
    return folder


def given(parser: argparse.ArgumentParser, folder: Path) -> list[str]:
    """Return something for each argument that is not an option: what its name asks for, and nothing good in it."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text("prefer: flagos\n")
    write_verl(folder / "source", BROKEN["is half deleted"])
    known = {"MODEL": "model", "TARGET": "source", "FILE": "mine.yaml"}
    positional = [action for action in parser._actions if not action.option_strings]
    return [next(iter(a.choices)) if a.choices else str(folder / known.get(a.metavar, "x")) for a in positional]


def walk(
    name: str, folder: Path, shell: str = '"$@"', *, heard: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, by ``shell`` with the command as "$@"; check what holds for each command in each situation.

    Unless it is not ``heard``, a command that refuses says why.
    """
    parser = commands.COMMANDS[name]
    command = [sys.executable, "-m", "verl_fl_overlay", *name.split(), *given(parser, folder)]
    (folder / "here").mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        cwd=folder / "here",
        env=clean_environment({**environment, **PLAIN, "PYTHONPATH": f"{folder / 'site'}:{HERE}"}),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]  # less the progress
    for sign in ("Traceback", "Exception ignored", "<frozen"):
        assert sign not in done.stdout + done.stderr, done.stderr
    assert done.returncode in {*commands.statuses(parser), terminal.LEFT_BY_READER}
    assert len(said) <= 2, done.stderr
    if done.returncode == 2 and heard:
        assert said[0].startswith(f"verl-fl {name}: "), done.stderr
        assert len(said[0]) > len(f"verl-fl {name}: ") + 20, "it says what to do"
    return done


@bare
@each_command
def test_without_verl_and_torch(name, tmp_path):
    walk(name, tmp_path)


@bare
@each_command
@pytest.mark.parametrize("how", BROKEN)
def test_with_a_verl_that(how, name, tmp_path):
    write_verl(tmp_path / "site", BROKEN[how])
    done = walk(name, tmp_path, VERL_USE_EXTERNAL_MODULES="verl_fl_overlay")
    if name == "doctor":
        assert done.returncode == 1
        (problem,) = done.stdout.partition("problems\n")[2].splitlines()
        assert any(way in problem for way in ("python -c 'import verl'", "install verl", "hint verl", "Set it in"))


@bare
@each_command
def test_into_a_pipe_that_nobody_reads(name, tmp_path):
    """Less than the buffer is written when the command is done, and more than it before."""
    done = walk(name, tmp_path, '"$@" | true; exit ${PIPESTATUS[0]}')
    assert done.returncode in (terminal.LEFT_BY_READER, 2)
    both = walk(name, tmp_path, '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', heard=False)
    assert both.returncode in (terminal.LEFT_BY_READER, 2)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["ops", "--faults"], ["env", "--wide"], ["env", "--sh"], []])
def test_into_a_pipe_that_is_closed(arguments, unbuffered, tmp_path):
    command = [sys.executable, "-m", "verl_fl_overlay", *arguments]
    process = subprocess.Popen(
        command,
        env=clean_environment({"PYTHONUNBUFFERED": unbuffered}),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.wait() == terminal.LEFT_BY_READER
    assert process.stderr.read() == b""
    process.stderr.close()


@bare
@each_command
def test_onto_a_full_disk(name, tmp_path):
    done = walk(name, tmp_path, '"$@" >/dev/full')
    assert done.returncode == 2


ODD = {
    "COLUMNS": "40",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "HOME": "/proc/nothing",
    "USE_FLAGGEMS": "1",
}


@bare
@each_command
def test_where_much_is_odd_at_once(name, tmp_path):
    """A folder that was removed, no standard input, a narrow window, letters that cannot be written, no home."""
    write_verl(tmp_path / "site", {"__init__.py": "raise RuntimeError('kein Ger\u00e4t')"})
    plain = walk(name, tmp_path)
    odd = walk(name, tmp_path, 'rmdir ../here; exec "$@" <&-', **ODD)
    assert odd.returncode == plain.returncode
    assert bool(odd.stdout) == bool(plain.stdout)
    if name == "doctor":
        assert r"kein Ger\xe4t" in odd.stdout
        assert "FlagGems is not installed" in odd.stdout, "what is tried in a process of its own tells of it"


def test_with_streams_that_take_nothing(tmp_path):
    """Before any command is asked: no JSON goes elsewhere, and where the reason cannot be told, the status tells it."""

    def run(redirected: str, *arguments: str) -> tuple[int, str, str]:
        shell = ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-m", "verl_fl_overlay", *arguments]
        site = write_verl(tmp_path / "site", {"__init__.py": "import os\nos.write(1, b'a library says this')"})
        env = clean_environment({**PLAIN, "PYTHONPATH": f"{site}:{HERE}"})
        done = subprocess.run(shell, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    closed = "verl-fl: standard output is closed, and all that a command says goes there\n"
    assert run(">&-", "env") == (2, "", closed)
    for nothing in ("2>&-", "2>/dev/full", "<&- >&- 2>&-"):
        assert run(nothing, "check", "nothing") == (2, "", "")
    status, told, _ = run("<&- 2>&-", "doctor", "--json")  # it sends to standard error what others print meanwhile
    assert status == 1
    assert json.loads(told)["problems"]


@each_command
def test_with_wrong_arguments(name, tmp_path, capsys):
    parser = commands.COMMANDS[name]
    typed = [*name.split(), *given(parser, tmp_path)]
    wrong = [[*typed, "--bogus"], [*typed, "one too many", "and another"]]
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and (action.choices or action.type in (int, float)):
            wrong += [[*typed, action.option_strings[0], "bogus"], [*typed, action.option_strings[0]]]
    if any(not action.option_strings and action.required for action in parser._actions):
        wrong.append(name.split())
    for arguments in wrong:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        first, second = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert first.startswith(f"verl-fl {name}: ")
        assert second.split() == ["what", "it", "takes:", "verl-fl", *name.split(), "--help"]


@bare
@each_command
def test_with_files_that_are_none(name, tmp_path, capsys, monkeypatch):
    """A folder, a device without an end, a place where nothing can be written, a user's home that is not there."""
    monkeypatch.chdir(tmp_path)
    parser = commands.COMMANDS[name]
    files = [a for a in parser._actions if a.metavar in ("FILE", "DIR", "TARGET", "MODEL")]
    for action in files:
        for file in (str(tmp_path), "/dev/zero", "/proc/nothing/x", "~nobody-here/x", ""):
            option = [*given(parser, tmp_path), *action.option_strings[:1]] if action.option_strings else []
            arguments = [*option, file]
            status = cli.main([*name.split(), *arguments])
            told = capsys.readouterr()
            assert status in commands.statuses(parser)
            assert "Traceback" not in told.err + told.out
            assert len(told.err.splitlines()) <= 2 + told.err.count(" ...\n")
            assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("file", ["/proc/nothing/x.png", "/dev/zero", "/"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(file, tmp_path, capsys):
    profile = str(SHIPPED / "nvidia_h100.json")
    assert cli.main(["tune", "--show", "--out", profile, "--plot", file]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"verl-fl tune: --plot {file}")


def test_without_pyyaml_nothing_is_said_of_a_dispatch_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("prefer: flagos\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert cli.main(["dispatch", "check", str(tmp_path / "mine.yaml")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "PyYAML is not installed" in told.err


def test_after_control_c(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("verl_fl_overlay.cli.env.examine", interrupted)
    assert cli.main(["env"]) == terminal.INTERRUPTED
    assert capsys.readouterr().err == "verl-fl env: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_command_started_ends_with_it(number, tmp_path):
    """A batch system sends it to the command alone, and a component that hangs would be there for ever."""
    write_verl(tmp_path, BROKEN["raises"])
    started = tmp_path / "started"
    (tmp_path / "flag_gems").mkdir()
    (tmp_path / "flag_gems" / "__init__.py").write_text(
        f"import os, time\nopen({str(started)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.replace({str(started)!r} + '.new', {str(started)!r})\ntime.sleep(600)\n"
    )
    env = clean_environment({**PLAIN, "PYTHONPATH": f"{tmp_path}:{HERE}", "TRAINING_FL_FLAGGEMS_ENABLE": "1"})
    command = [sys.executable, "-m", "verl_fl_overlay", "doctor"]
    process = subprocess.Popen(
        command,
        env=env,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup it would be ignored, and rightly so
    )
    while process.poll() is None and not started.exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_file_that_cannot_be_opened_is_named(monkeypatch, capsys):
    def refused(*_):
        open("/proc/nothing/x")  # noqa: SIM115

    monkeypatch.setattr("verl_fl_overlay.cli.env.examine", refused)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == (
        "verl-fl env: /proc/nothing/x cannot be read or written: No such file or directory\n"
    )


def test_an_engine_that_fails_is_told_in_a_line_and_the_rest_is_kept():
    """What verl and torch print after the error, or while they are taken down, is not the reason."""
    printed = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: no memory\nsome thread ended\n"
    told = trial._why_failed(subprocess.CompletedProcess([], 1, "output\n", printed))
    said, _, log = told.rpartition(". All that it printed is in ")
    assert said == "the engine failed, exit status 1: torch.OutOfMemoryError: no memory"
    assert Path(log).read_text() == f"output\n{printed}"
    Path(log).unlink()
    told = trial._why_failed(subprocess.CompletedProcess([], -9, "", ""))
    assert told.startswith("the engine failed, SIGKILL (the machine may be short of memory). All")
    Path(told.split()[-1]).unlink()


def test_a_folder_that_was_removed_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("verl_fl_overlay.cli.env.examine", lambda *_: Path("relative").absolute())
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "verl-fl env: the folder in which you are was removed; cd to another\n"


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    """A traceback is what a report of a fault needs; only what a user can mend is a line."""

    def faulty(*_):
        raise KeyError("ours")

    monkeypatch.setattr("verl_fl_overlay.cli.env.examine", faulty)
    with pytest.raises(KeyError, match="ours"):
        cli.main(["env"])


LIBRARY_S = (
    OSError("Can't load the tokenizer of 'model'"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    TimeoutError("timed out"),
    FileNotFoundError("checkpoint is missing"),
)


@pytest.mark.parametrize("error", LIBRARY_S, ids=str)
def test_an_error_of_a_library_is_not_taken_for_one_of_standard_output(error, monkeypatch):
    """transformers, sockets, fork and ctypes raise OSError too; only with its traceback can anybody mend it."""

    def raises(*_):
        raise error

    monkeypatch.setattr("verl_fl_overlay.cli.env.examine", raises)
    with pytest.raises(type(error)) as raised:
        cli.main(["env"])
    assert raised.value is error


def test_nothing_is_left_half_written_on_a_full_disk(tmp_path):
    file = tmp_path / "profile.json"
    file.write_text("old")
    (tmp_path / "profile.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*profile\.json'"):
        write_whole(file, "new")
    assert [file] == list(tmp_path.iterdir())
    assert file.read_text() == "old"
