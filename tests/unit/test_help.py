"""What every command tells of itself: found in the parser, so that a new command cannot forget any of it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys

import commands
import pytest
from processes import clean_environment, output

from verl_fl_overlay import cli
from verl_fl_overlay.flaggems.profile import SHIPPED
from verl_fl_overlay.packages import installed

each_command = pytest.mark.parametrize("name", commands.COMMANDS)


def of(name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@each_command
def test_it_is_whole_and_fits_the_window(name, monkeypatch, capsys):
    lines = of(name, 80, monkeypatch, capsys)
    assert max(map(len, lines)) <= 80
    assert "examples:" in lines
    assert "exit status:" in lines
    parser = commands.COMMANDS[name]
    assert len(re.findall(r"[a-z)]\. [A-Z-]", f"{parser.description} A")) >= 2, "what it is, and what it does"
    assert {0, 2} <= commands.statuses(parser).keys()


@each_command
def test_it_is_told_in_a_narrow_window(name, monkeypatch, capsys):
    for width in (40, 10):
        assert "examples:" in of(name, width, monkeypatch, capsys)


@each_command
def test_every_argument_says_what_it_is_and_what_it_is_by_default(name):
    for action in commands.COMMANDS[name]._actions:
        assert action.help, f"{name} {action.dest} says nothing"
        if action.option_strings and action.nargs != 0:
            assert "(default: " in action.help, f"{name} {action.option_strings} does not say what it is by default"


@each_command
def test_its_examples_can_be_typed(name):
    """Each is one of this command, or of its group, and takes what it is given."""
    found = commands.examples(commands.COMMANDS[name])
    assert found
    for example in found:
        typed = re.split(r" [|>] ?", example)[0]
        assert typed.startswith(f"verl-fl {name}"), example
        cli.parser(cli.NAMES).parse_args(shlex.split(typed)[1:])


REPORT = {
    "verl": {"version": "0.9.1"},
    "process": {"program": "trainer/main_ppo.py", "rank": "0"},
    "phase": {"counts": {"train": 1}},
    "hooks": [],
    "features": {},
    "problems": [],
}

NOT_HERE = re.compile(r"MODEL|latest|~|\.whl|--te-fl|\d\.\d\.\d|verl-fl ops (?!--faults)")
"""Examples that need verl and a model, FlagGems, or the package index."""


@pytest.mark.parametrize(
    "example",
    [e for parser in commands.COMMANDS.values() for e in commands.examples(parser) if not NOT_HERE.search(e)],
)
def test_its_examples_run(example, tmp_path):
    (tmp_path / "mine.yaml").write_text("prefer: flagos\n")
    (tmp_path / "profile.json").write_bytes((SHIPPED / "nvidia_h100.json").read_bytes())
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "a.json").write_text(json.dumps(REPORT))
    shell = f'set -o pipefail; verl-fl() {{ {shlex.quote(sys.executable)} -m verl_fl_overlay "$@"; }}; {example}'
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=clean_environment({}), capture_output=True, text=True, check=False
    )
    if "pip install" in done.stderr:
        pytest.skip(done.stderr.strip())  # PyYAML, matplotlib
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == "" or installed("verl")  # which says on standard error what it loads


def test_the_overview_names_every_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([]) == 2
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert told == commands.OVERVIEW.format_help()
    for name, summary in cli.NAMES.items():
        assert f"  {name} " in told
        assert summary in " ".join(told.split())
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, cli.parser(()).format_help().splitlines())) <= len("VERL_USE_EXTERNAL_MODULES=verl_fl_overlay.")


@pytest.mark.parametrize("asked", [[], *([name] for name in cli.NAMES)])
def test_it_imports_no_more_than_it_needs(asked):
    """A command's file is imported when it is asked for; rich, torch and what reads sources are not for help."""
    program = f"""
        import contextlib, io, sys
        from verl_fl_overlay.cli import main
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main([*{asked!r}, "--help"])
        print([name for name in sys.modules])"""
    found = set(eval(output(program, env={})))
    assert not {"rich", "torch", "yaml", "matplotlib", "verl_fl_overlay.flaggems.tuning.tune"} & found
    if not asked:
        assert {name for name in found if name.startswith("verl_fl_overlay.cli.")} == {"verl_fl_overlay.cli.terminal"}
        assert not {"verl_fl_overlay.compat.release", "packaging.requirements", "verl_fl_overlay.flaggems"} & found


def test_an_unknown_command_is_told_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctr"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("verl-fl: there is no command 'doctr'; doctor?\n")


def test_a_parser_that_forgets_is_seen():
    """The tests above are about what they find: a parser without an example or a status shows none."""
    bare = argparse.ArgumentParser("verl-fl bare")
    assert commands.examples(bare) == []
    assert commands.statuses(bare) == {}
