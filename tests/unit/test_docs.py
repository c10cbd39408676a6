"""The pages name nothing that is not there, and quote what the source says."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import schemas
import verl_trees

from verl_fl_overlay import activation, compat
from verl_fl_overlay.cli import main
from verl_fl_overlay.devices.chips import CHIPS
from verl_fl_overlay.overlay import Overlay
from verl_fl_overlay.settings import TABLE, Settings

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), ROOT / "compat" / "README.md", *(ROOT / "docs").rglob("*.md")]
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@functools.cache
def text(page):
    return page.read_text(encoding="utf-8")


def shell(page):
    """Yield each line of a page's blocks of shell, with its continuation lines."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        if language in ("", "bash"):
            yield from block.replace("\\\n", " ").splitlines()


def inline(page):
    """Yield each piece of code in a page's text."""
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", prose))


def code(page):
    """Yield both."""
    yield from shell(page)
    yield from inline(page)


def anchors(page):
    """Return what the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_readme_is_one_screen():
    assert len(text(ROOT / "README.md").splitlines()) < 120


@each_page
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(linked):
            wrong.append(f"{target}: {linked.name} has {sorted(anchors(linked))}")
    assert not wrong


@each_page
def test_files_that_are_named_are_there(page):
    """Names with X, Y or * stand for several; a folder ends with a slash."""
    folders = "benchmarks|compat|docs|examples|tests|tools|verl_fl_overlay"
    named = {piece for line in code(page) for piece in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./*-]*", line)}
    real = {name for name in named if not re.search(r"(?<![A-Za-z])[XY](?![A-Za-z])", name)}
    assert not {name for name in real if not list(ROOT.glob(name.rstrip("/.")))}


@each_page
def test_variables_that_are_named_are_known(page):
    prefixes = "VERL_FL|TRAINING_FL|VLLM_FL|SGLANG_FL|TE_FL|FLAGCX|FLAGGEMS"
    named = set(re.findall(rf"(?<![\w$])(?:{prefixes})_[A-Z_]*[A-Z]\b(?!_)", text(page)))
    assert not named - TABLE.keys()


@each_page
def test_hooks_that_are_named_are_there(page):
    hooks = {hook.name for release in pages.by_release().values() for hook in release}
    wrong = set()
    for line in code(page):
        for name in re.findall(r"VERL_FL_DISABLE='?([a-z][\w.,]*)", line):
            wrong |= set(name.split(",")) - hooks
        if re.fullmatch(rf"(?:{'|'.join(pages.AREAS)})\.[a-z_.]+", line) and not line.endswith((".sh", ".py")):
            wrong |= {line} - hooks
    assert not wrong


def typed(line):
    """Yield the words of each of the overlay's commands in a line."""
    for command in re.findall(r"(?:\bverl-fl|python -m verl_fl_overlay) +([a-z][^|;&>)]*)", line):
        yield shlex.split(command, comments=True)


@each_page
def test_commands_in_shell_parse(page):
    wrong, parsers = [], pages.parsers()
    for name, *arguments in (words for line in shell(page) for words in typed(line)):
        try:
            parsers[name].parse_args(arguments)
        except (KeyError, SystemExit):
            wrong.append(" ".join([name, *arguments]))
    assert not wrong


@each_page
def test_commands_and_options_that_are_named_are_there(page):
    parsers = pages.parsers()
    known = {name.split()[0]: set() for name in parsers}
    for name, parser in parsers.items():
        known[name.split()[0]] |= set(parser._option_string_actions)
    named = [words for line in inline(page) for words in typed(line)]
    unknown = [words for words in named if not {w for w in words[1:] if w[0] == "-"} <= known.get(words[0], set())]
    assert not unknown
    assert not {words[0] for words in named} - known.keys()


def test_each_chip_has_a_recipe():
    others = text(ROOT / "docs" / "chips" / "others.md").partition("## Versions that fit")[2]
    pages_of_their_own = {page.stem for page in (ROOT / "docs" / "chips").glob("*.md")}
    assert CHIPS.keys() - pages_of_their_own == set(re.findall(r"^\| (\w+) \|", others.partition("##")[0], re.M)) - {
        "chip"
    }


def said_in_the_source():
    """Return the texts in the source, without what is put into them when the program runs."""
    texts = set()
    for file in [*(ROOT / "verl_fl_overlay").rglob("*.py"), *(ROOT / "compat").rglob("*.py")]:
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.add(" ".join("".join(parts).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(" ".join(node.value.split()))
    return texts


def test_troubleshooting_quotes_what_the_source_says():
    page = text(ROOT / "docs" / "troubleshooting.md")
    quoted = re.findall(r"^```text\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)
    assert len(quoted) >= 25
    everything = "\n".join(said_in_the_source())
    pieces = [" ".join(piece.split()) for quote in quoted for piece in quote.split("...")]
    gone = [piece for piece in pieces if len(piece) > 7 and piece.strip(".: ") not in everything]
    assert not gone
    assert [quote for quote in quoted if max(map(len, quote.split("..."))) < 12] == [], "nothing to search for"


def test_troubleshooting_has_a_reason_and_a_way_out_for_each():
    page = text(ROOT / "docs" / "troubleshooting.md")
    entries = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    assert [entry for entry in entries if "**Reason**" not in entry or "**Way out**" not in entry] == []


def test_the_plots_are_those_of_the_measurements():
    done = subprocess.run([sys.executable, ROOT / "tools" / "plots.py", "--check"], cwd="/", check=False)
    assert done.returncode == 0, "run: python tools/plots.py"


def test_the_page_says_what_was_measured():
    """Times with and without entropy, and those of both log-prob passes."""
    files = sorted((ROOT / "docs" / "measurements").glob("realistic-h100-*.json"))
    command = [sys.executable, ROOT / "benchmarks" / "realistic.py", "--merge", *files]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = printed.partition("| row | train ms")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 5
    page = text(ROOT / "docs" / "performance.md")
    assert [row for row in rows if f"| {row[1]} |" not in page or f"| {row[4]} |" not in page] == []
    readme = text(ROOT / "README.md")
    assert [row for row in rows if f"| {' | '.join(row[1].split(' / '))} |" not in readme] == []


@pytest.fixture
def overlay(monkeypatch):
    """Make an overlay that is not installed the active one."""
    shim = compat.select(compat.InstalledVerl(compat.RELEASES[-1], ""))
    monkeypatch.setattr(activation._process, "overlay", Overlay(Settings(), shim))


def test_a_report_is_as_its_schema_says(overlay, tmp_path, capsys):
    report = activation.report()
    assert schemas.faults(report, "report") == []
    (tmp_path / "a.json").write_text(json.dumps(report))
    assert main(["doctor", "--reports", str(tmp_path), "--json"]) == 1, "it did not train"
    assert schemas.faults(json.loads(capsys.readouterr().out), "run") == []


def test_a_report_without_an_overlay_is_as_its_schema_says(monkeypatch):
    monkeypatch.setattr(activation._process, "overlay", None)
    assert schemas.faults(activation.report(), "report") == []


def test_env_is_as_its_schema_says(monkeypatch, capsys):
    monkeypatch.setenv("FLAGCX_RANK", "1")
    monkeypatch.setenv("TE_FL_NEW", "1")
    main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert schemas.faults(found, "env") == []
    assert found["kept back"]
    assert found["not in the table"]


def test_check_is_as_its_schema_says(capsys):
    main(["check", str(verl_trees.newest().folder), "--json"])
    assert schemas.faults(json.loads(capsys.readouterr().out), "check") == []


def test_the_check_of_schemas_finds_what_differs():
    report = {"overlay": 1, "new": ""}
    found = schemas.faults(report, "report")
    assert "report.overlay: 1 is not of type ['string']" in found
    assert "report: the schema does not know 'new'" in found
    assert "report: there is no 'problems'" in found


@pytest.mark.parametrize("file", sorted(schemas.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_schemas_are_schemas(file):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(json.loads(file.read_text(encoding="utf-8")))
