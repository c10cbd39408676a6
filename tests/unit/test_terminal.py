"""What commands write: tables that fit the window, sentences, colours on a terminal alone, progress beside it."""

from __future__ import annotations

import dataclasses
import os
import pty
import subprocess
import sys

import pytest
from processes import clean_environment

from verl_fl_overlay import activation, compat
from verl_fl_overlay.cli import check, doctor, env, ops, parity, run_reports, te_fl, terminal, tune
from verl_fl_overlay.compat.pins import VERL
from verl_fl_overlay.compat.release.check import Comparison, Finding, Outcome, Report, Status
from verl_fl_overlay.flaggems.profile import SHIPPED, load

LONG = "one or two words that are wrapped where the window ends, and never cut"


@pytest.fixture
def window(monkeypatch):
    """Return a function that makes the window this wide, on a terminal that has no colours."""

    def made(width: int) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    return made


def test_the_last_column_is_wrapped_and_numbers_are_set_right(window):
    window(60)
    assert terminal.table(("name", "calls", "why"), [("mm", "7", LONG), ("add", "1,234", "short")]) == [
        "name  calls  why",
        "mm        7  one or two words that are wrapped where the",
        "             window ends, and never cut",
        "add   1,234  short",
    ]


def test_in_a_narrow_window_a_long_text_goes_under_the_other_columns(window):
    window(40)
    assert terminal.table(("name", "calls", "why"), [("a" * 20, "7", LONG), ("add", "1", "short")]) == [
        f"name{' ' * 18}calls  why",
        f"{'a' * 20}      7",
        "    one or two words that are wrapped",
        "    where the window ends, and never cut",
        f"add{' ' * 23}1  short",
    ]
    (first, *_) = terminal.table((), [("name " * 8, "b" * 20, LONG)])
    assert first == "name name name name name name name name", "what is longer than the window is wrapped, too"


def test_wide_is_one_line_a_row(window):
    window(40)
    rows = [("mm", LONG), ("add", "")]
    assert terminal.table((), rows, wide=True) == [f"mm   {LONG}", "add"]
    assert terminal.sentences([LONG], wide=True) == [LONG]


def test_a_path_is_not_broken(window):
    window(40)
    path = f"/{'folder/' * 9}"
    assert terminal.table((), [("name", f"it is {path} here")]) == ["name", "    it is", f"    {path}", "    here"]


def test_a_sentence_is_wrapped_on_a_terminal_and_whole_in_a_pipe(window, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert terminal.sentences([LONG], "  ") == [f"  {LONG}"]
    window(40)
    assert terminal.sentences([LONG], "  ") == [
        "  one or two words that are wrapped",
        "    where the window ends, and never cut",
    ]


def test_an_empty_table_is_no_line():
    assert terminal.table((), []) == []
    assert terminal.table(("a", "b"), []) == ["a  b"]


LINE = parity.Line("grad_norm of model.layers.*.post_attention_layernorm.weight, relative", 1e-3, 2e-3, 0.02)
LINES = [
    {**dataclasses.asdict(line), "holds": line.holds} for line in (LINE, dataclasses.replace(LINE, difference=0.5))
]
USE = {"operator": "generic_gemm", "use": "weight's gradient, accumulated", "implementation": "default.flagos"}
PROCESSES = {"processes": 8, "ranks": "0-3,8", "program": "workers/default_worker.py", "verl": "0.9.1", "problems": 1}


def texts(wide: bool) -> dict[str, str]:
    """Return what each command prints, of data with every kind of row."""
    shown = activation.report()
    shown |= {"overlay folder": "/site/verl_fl_overlay", "versions": {"torch": "2.13.0"}, "problems": [LONG]}
    shown["packages"] = {"transformers": {"version": "5.10.4", "pinned": ["4.57.6", "5.10.4"]}}
    shown["verl"] = {"version": "0.9.1", "shim": "v0_9", "supported": False}
    shown["components"] = {
        "FlagGems": {"asked for by": "TRAINING_FL_FLAGGEMS_ENABLE=1", "fault": LONG, "file": "/x.py"}
    }
    hook = {"name": "flagcx.checkpoint_engine_class", "required": True, "pinned": "body differs", "outcome": "review"}
    target = "verl.workers.engine.torchtitan.transformer_impl:TorchTitanEngine.initialize"
    shown["hooks"] = [{**hook, "state": "installed", "detail": LONG, "target": target}]
    shown["features"]["phase"]["detail"] = {"states": {"a": LONG}}
    row = {**PROCESSES, "training": "yes", "hooks called": "12 of 34 installed", "features on": LONG.split()}
    summed = {"processes": [row], "hooks": {"engine.enter": {"processes": 8, "calls": 1234}}, "trained": True}
    exact = {"attention": "eager", "padding": True}
    compared = {"model": "/models/a", "tokens": 96, "verl": "0.9.1", "device": "cpu", "native": exact, **exact}
    gone = Comparison("verl.workers.engine.base:BaseEngine.train_batch", Status.MOVED, "0.9.0", LONG, breaks=True)
    finding = Finding(compat.select(compat.InstalledVerl("0.9.1", "")).hooks[0], gone, (), Outcome.REFUSED, LONG)
    failed = {**USE, "runs": False, "of_allowed": None, "failed": LONG}
    return {
        "doctor": doctor.as_text(shown, every=True, wide=wide),
        "doctor --reports": run_reports.as_text(
            {**summed, "never called": ["engine.infer_batch"], "problems": {LONG: 3}}, wide
        ),
        "env": env.as_text(env.examine({"USE_FLAGCX": "maybe", "VERL_FL_DEVISE": "cpu"}), wide),
        "ops": ops.as_text([{"function": "add", "keys": {"add.Tensor": "", "add.Scalar": LONG}}], wide),
        "check": check.as_text(Report(VERL, "0.9.1", "here", "v0_9", (finding,), (gone,)), wide=wide),
        "tune": "\n".join(tune.as_text(load(SHIPPED / "nvidia_h100.json"), wide)),
        "parity": parity.as_text({**compared, "lines": LINES, "same": False}, wide),
        "parity --te-fl": te_fl.as_text([{**USE, "runs": True, "of_allowed": 0.25, "failed": ""}, failed], wide),
    }


@pytest.mark.parametrize("width", [80, 40])
def test_every_text_fits_its_window(width, window):
    window(width)
    for name, text in texts(wide=False).items():
        for line in text.splitlines():
            assert len(line) <= width or len(line.split()) == 1, f"{name}: {line}"


def test_every_row_of_a_wide_text_is_one_line(window):
    window(40)
    told = texts(wide=True)
    for name in ("doctor", "ops", "check", "parity --te-fl"):
        assert [line for line in told[name].splitlines() if LONG in line], name
    assert [line for line in told["doctor --reports"].splitlines() if ", ".join(LONG.split()) in line]
    assert [line for line in told["parity"].splitlines() if line.endswith(LINE.name)]
    assert [line for line in told["env"].splitlines() if line.endswith("[1 or 0]") and "USE_FLAGCX=maybe" in line]
    assert [line for line in told["tune"].splitlines() if line.startswith("isfinite ") and line.endswith("be cut")]


def in_terminal(*arguments: str, **environment: str) -> str:
    """Return what a command writes to a terminal of 80 columns."""
    ours, its = pty.openpty()
    env = clean_environment({"TERM": "xterm", "COLUMNS": "80", "VERL_FL_DEVICE": "cpu", **environment})
    command = [sys.executable, "-m", "verl_fl_overlay", *arguments]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=its, stderr=subprocess.DEVNULL)
    os.close(its)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
    except OSError:  # how Linux says that the other side was closed
        pass
    process.wait()
    os.close(ours)
    return written.decode()


RED, BOLD = "\x1b[1;31m", "\x1b[1m"


def test_colours_are_on_a_terminal_alone():
    faulty = {"USE_FLAGCX": "maybe"}
    coloured = in_terminal("env", **faulty)
    assert f"{RED}errors\x1b[0m" in coloured
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert RED not in in_terminal("env", **faulty, **plain)
    assert "\x1b" not in in_terminal("env", TERM="dumb", **faulty)
    command = [sys.executable, "-m", "verl_fl_overlay", "env"]
    piped = subprocess.run(command, env=clean_environment(faulty), capture_output=True, text=True, check=False).stdout
    assert "errors" in piped
    assert "\x1b" not in piped


def test_colours_do_not_move_a_column():
    lines = in_terminal("tune", "--show", "--out", str(SHIPPED / "nvidia_h100.json")).splitlines()
    bare = in_terminal("tune", "--show", "--out", str(SHIPPED / "nvidia_h100.json"), TERM="dumb").splitlines()
    assert any(BOLD in line for line in lines)
    assert [line.replace(BOLD, "").replace("\x1b[0m", "").replace("\x1b[32m", "") for line in lines] == bare


def test_a_clock_runs_on_a_terminal():
    program = "from verl_fl_overlay.cli import terminal\nwith terminal.step('1/2 a step'): print('output')"
    ours, its = pty.openpty()
    env = clean_environment({"TERM": "xterm", "COLUMNS": "80"})
    done = subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=its, check=True)
    os.close(its)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.stdout == b"output\n"
    assert "0:00:00" in shown
    assert shown.endswith("1/2 a step: 0 s\r\n")


def test_progress_is_no_output(capfd):
    with terminal.step("1/2 a step"):
        terminal.progress("within")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "1/2 a step ...\nwithin\n1/2 a step: 0 s\n"


def test_parity_says_how_far_it_is_and_json_stays_json(monkeypatch, capsys):
    run = {"tokens": 8, "overlay": {"verl": {"version": "0.9.1"}, "device": "cpu", "features": {}}}
    monkeypatch.setattr(parity, "run_trial", lambda *_: run)
    monkeypatch.setattr(parity, "run_with_overlay", lambda *_: run)
    monkeypatch.setattr(parity, "kernels_of", lambda _: {})
    monkeypatch.setattr(parity, "compare", lambda *_, **__: [LINE])
    result = parity.examine(parity.Trial("/models/a"))
    told = capsys.readouterr()
    assert result["same"]
    assert told.out == ""
    assert [line[:3] for line in told.err.splitlines()] == [f"{n}/4" for n in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_the_hooks_that_are_as_they_should_be_are_counted():
    fine = {"name": "a", "required": True, "pinned": "yes", "outcome": "works", "state": "installed"}
    gone = {**fine, "name": "b", "outcome": "without", "pinned": "missing"}
    waits = {**fine, "name": "c", "state": "waiting"}
    made = [{**hook, "detail": "", "target": "verl:x"} for hook in (fine, gone, waits)]
    made.append({**made[2], "name": "d", "detail": "not needed here: veomni is not installed"})
    made.append({**made[1], "name": "e", "state": "disabled"})

    def first(every: bool) -> list[str]:
        return [line.split()[0] for line in doctor._hooks(made, every=every, wide=True)]

    assert first(every=False) == ["hook", "b", "c", "hooks:"]
    assert first(every=True) == ["hook", "a", "b", "c", "d", "e", "hooks:"]
