"""``install-hint``: lines that fit what is here.  The matrix installs the same versions, and runs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import run

import verl_fl_overlay
from verl_fl_overlay import compat, versions
from verl_fl_overlay.cli import install_hint, main
from verl_fl_overlay.cli.install_hint import ADDITIONS, MAKE, constraints, harmless, hints
from verl_fl_overlay.devices.chips import CHIPS
from verl_fl_overlay.versions import Unmet

HERE = Path(verl_fl_overlay.__file__).parents[1]
ROOT = Path(__file__).parents[2]
PINNED = "verl==0.9.1 einops uvicorn fastapi cachetools pyzmq msgspec"


def lines(component: str, release: str = "0.9.1", torch: str = "2.11.0", vendor: str = "nvidia") -> list[str]:
    return [line for _, told in hints(component, release, torch, vendor) for line in told]


def requirements(line: str) -> list[Requirement]:
    """Return what a line gives to pip, without options; fail if it is not well-formed."""
    words = shlex.split(line.partition("pip install")[2])
    skipped = {i for i, word in enumerate(words) if word.startswith("-")}
    skipped |= {i + 1 for i in skipped if words[i] == "-c"}
    return [Requirement(word) for i, word in enumerate(words) if i not in skipped and "/" not in word]


@pytest.mark.parametrize("release", compat.RELEASES)
def test_every_release_has_constraints_beside_the_package(release):
    file = constraints(release)
    assert file == Path(compat.__file__).parent / "constraints" / f"verl-{release}.txt"
    assert constraints(f"{release}.dev0") == file  # a git checkout
    assert constraints(f"{release}.9") is None


@pytest.mark.parametrize("vendor", ["", "nvidia", "ascend", "biren"])
@pytest.mark.parametrize("release", [*compat.RELEASES, "0.9.1.dev3", "0.10.0"])
@pytest.mark.parametrize("component", ADDITIONS)
def test_each_hint_says_why_and_asks_for_nothing_that_the_constraints_exclude(component, release, vendor):
    file = constraints(release)
    fixed = dict(line.split("==") for line in file.read_text().split()) if file else {}
    told = hints(component, release, "2.13.0+cpu", vendor)
    assert told
    for why, printed in told:
        assert why.endswith(".") or re.search(r"https://github.com/\S+$", why), why
        for line in printed:
            assert "{" not in line
            for asked in requirements(line) if "-c " in line else []:
                version = fixed.get(asked.name.lower())
                assert version is None or asked.specifier.contains(version), line


def test_constraints_and_the_torch_that_is_here_are_held():
    file = shlex.quote(str(constraints("0.9.1")))
    first, *_ = lines("flaggems", torch="2.8.0+metax3.5")
    assert first == f"pip install -c {file} torch==2.8.0+metax3.5 flag-gems==5.0.0"
    first, *_ = lines("flaggems", torch="")
    assert first == f"pip install -c {file} flag-gems==5.0.0"
    assert lines("verl", torch="") == [f"pip install -c {file} {PINNED}"]


def test_a_path_with_spaces_is_one_word(monkeypatch, tmp_path):
    folder = tmp_path / "my verl" / "compat"
    (folder / "constraints").mkdir(parents=True)
    (folder / "constraints" / "verl-0.9.1.txt").write_text("numpy==2.2.6\n")
    monkeypatch.setattr(compat, "__file__", str(folder / "__init__.py"))
    words = shlex.split(lines("flaggems")[0])
    assert words[3] == str(folder / "constraints" / "verl-0.9.1.txt")


def test_a_release_without_constraints_holds_what_is_installed():
    assert lines("flaggems", "0.9.7", torch="2.11.0")[:2] == [
        "pip list --format=freeze > here.txt",
        "pip install -c here.txt torch==2.11.0 flag-gems==5.0.0",
    ]
    for component in ("verl", "vllm"):  # what is installed has another verl, which would contradict the line
        assert hints(component, "0.9.7", "", "nvidia") == [
            ("No constraints are known for verl 0.9.7: no set of versions was run with it.", [])
        ]


def test_what_vllm_was_installed_with_is_held():
    for component in ("flaggems", "megatron"):
        for why, printed in hints(component, "0.9.1", "2.11.0", "nvidia", "vllm 0.24.0"):
            assert "constraints/" not in " ".join(printed)
            assert not printed or (printed[0].endswith("> here.txt") and "vllm 0.24.0, which is here" in why)
    assert hints("verl", "0.9.1", "", "", "vllm 0.24.0") == hints("verl", "0.9.1", "", "")


def test_the_pages_install_as_the_hint_does():
    page = (ROOT / "docs" / "flagcx.md").read_text()
    assert [line for line in lines("flagcx") if line not in page] == []
    line, *_ = lines("vllm", torch="")
    assert [
        page for page in ("README.md", "docs/install.md", "docs/training.md") if line not in (ROOT / page).read_text()
    ] == []


@pytest.mark.parametrize(
    "chip",
    [{"VERL_PLATFORM": "ascend"}, {"VERL_PLATFORM": "vastai"}, {"GEMS_VENDOR": "new"}, {"VERL_FL_DEVICE": "cpu"}],
)
def test_wheels_of_the_index_are_not_for_another_chip(chip, monkeypatch, capsys):
    """Also not for one that has a name and is not known here."""
    for name, value in chip.items():
        monkeypatch.setenv(name, value)
    for component in ("vllm", "sglang", "flash-attn"):
        assert main(["install-hint", component, "--verl", "0.9.1"]) == 1
        told = " ".join(capsys.readouterr().out.replace("# ", "").split())
        assert "for NVIDIA alone" in told
        assert "pip install" not in told


def test_where_no_chip_is_it_is_said_which_one_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(install_hint.chips, "find", lambda: (None, install_hint.chips.NOTHING))
    assert main(["install-hint", "flagcx", "--verl", "0.9.1"]) == 0
    told = capsys.readouterr().out
    assert "so it is taken for NVIDIA's." in " ".join(told.replace("# ", "").split())
    assert "\nmake -C FlagCX USE_NVIDIA=1\n" in told


@pytest.mark.parametrize(
    ("component", "release", "torch", "replaced"),
    [("vllm", "0.9.1", "2.13.0+cpu", True), ("vllm", "0.9.1", "2.11.0+cu130", False), ("vllm", "0.8.0", "", False)],
)
def test_a_line_that_replaces_torch_says_so(component, release, torch, replaced):
    why, _ = hints(component, release, torch, "nvidia")[0]
    assert ("replaces torch" in why) == replaced


def test_flagcx_is_built_for_the_chip():
    assert MAKE.keys() <= CHIPS.keys()
    assert "make -C FlagCX USE_MUSA=1" in lines("flagcx", vendor="mthreads")
    assert "make -C FlagCX USE_<CHIP>=1" in lines("flagcx", vendor="biren")


def test_the_matrix_runs_what_is_hinted():
    """A version that no row of noxfile.py installs was not run."""
    nox = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for package, component in (("flag-gems", "flaggems"), ("megatron-core", "megatron")):
        run_there = set(re.findall(rf'"{package}==([^"]+)"', nox))
        assert {asked for line in lines(component) for asked in re.findall(rf"{package}==(\S+)", line)} == run_there
    engine_needs = re.search(r"ENGINE_NEEDS = \(([^)]*)\)", nox)
    assert engine_needs
    assert re.findall(r'"(\w+)"', engine_needs[1]) == PINNED.split()[1:]


def test_the_documented_output_is_the_commands(monkeypatch, capsys):
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    shown = text.partition("$ verl-fl install-hint flaggems\n")[2].partition("```")[0]
    monkeypatch.setattr(install_hint, "versions", lambda: {"Python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"})
    monkeypatch.setattr(install_hint.chips, "chosen", lambda settings: (None, install_hint.chips.NOTHING))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["install-hint", "flaggems", "--verl", "0.9.1"]) == 0
    told = re.sub(r"-c \S+/compat/", "-c COMPAT/", capsys.readouterr().out)
    assert told == re.sub(r"-c \S+/compat/", "-c COMPAT/", shown)
    assert set(re.findall(r"`([\w-]+)`", text.partition("COMPONENT is ")[2].partition(". ")[0])) == ADDITIONS.keys()


@pytest.mark.parametrize("release", compat.RELEASES)
def test_the_documented_constraints_are_those_of_the_release(release):
    (row,) = re.findall(rf"^\| {release} \|.*$", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    numpy, transformers = re.findall(r"[\d.]+[\d]", row)[-2:]
    pins = constraints(release).read_text().split()
    assert f"numpy=={numpy}" in pins
    assert f"transformers=={transformers}" in pins


def test_harmless_is_what_the_hint_leaves_unmet():
    assert harmless(Unmet("flag_gems", "5.0.2", "numpy", "==1.26.4", "2.2.6"))
    assert not harmless(Unmet("flag_gems", "5.0.2", "torch", ">=9", "2.13.0"))
    assert not harmless(Unmet("flag_gems", "5.0.0", "numpy", "==1.26.4", "2.2.6"))
    assert not harmless(Unmet("other", "5.0.2", "numpy", "==1.26.4", "2.2.6"))


def hinted(site: Path, *arguments: str, verl: str = "") -> tuple[int, str, str]:
    """Run the real command beside a fabricated verl; return status, standard output and standard error."""
    if verl:
        (site / "verl").mkdir()
        (site / "verl" / "__init__.py").write_text("raise ImportError('this verl is broken')")
        info = site / f"verl-{verl}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: verl\nVersion: {verl}\n")
    env = {"PYTHONPATH": f"{site}:{HERE}", "COLUMNS": "80"}
    done = run("-m", "verl_fl_overlay", "install-hint", *arguments, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_verl_that_cannot_be_imported_is_answered_for(tmp_path):
    status, told, _ = hinted(tmp_path, "flaggems", verl="0.8.0")
    assert status == 0
    assert told.startswith("# For verl 0.8.0. Here: Python ")
    assert "constraints/verl-0.8.0.txt" in told
    assert all(len(line) <= 80 for line in told.splitlines() if line.startswith("#"))


def test_another_release_can_be_named(tmp_path):
    status, told, _ = hinted(tmp_path, "flaggems", "--verl", "0.7.1", verl="0.9.1")
    assert status == 0
    assert "constraints/verl-0.7.1.txt" in told
    assert "0.9.1" not in told


def test_no_known_line_is_status_1(tmp_path):
    status, told, _ = hinted(tmp_path, "sglang", "--verl", "0.9.1")
    assert status == 1
    assert not [line for line in told.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("arguments", "verl", "said"),
    [
        (["flaggems", "--verl", "0.6.1"], "", "verl 0.6.1 is too old: the overlay needs verl >= 0.7.0"),
        (["flaggems", "--verl", "newest"], "", "'newest' is no version: a version is such as 0.9.1"),
        (["flaggems"], "0.6.1", "verl 0.6.1 is too old"),
        (["flaggems"], "of a vendor", "'of a vendor' is no version"),
        (["flaggem"], "", "invalid choice: 'flaggem'"),
    ],
)
def test_what_cannot_be_answered(tmp_path, arguments, verl, said):
    status, told, error = hinted(tmp_path, *arguments, verl=verl)
    assert (status, told) == (2, "")
    assert said in error


def test_a_torch_that_pip_does_not_know_is_not_put_into_a_line(monkeypatch, capsys):
    monkeypatch.setattr(versions, "installed", lambda module: module == "torch")
    monkeypatch.setattr(versions, "version", lambda distribution: "")
    assert main(["install-hint", "vllm", "--verl", "0.8.0"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "torch can be imported here and has no metadata" in told.err


def test_where_no_verl_is(monkeypatch, capsys):
    monkeypatch.setattr(compat, "find_verl", lambda: None)
    assert main(["install-hint", "flaggems"]) == 2
    assert "no verl is installed here: name a release with --verl" in capsys.readouterr().err
    assert main(["install-hint", "verl"]) == 0
    assert f"verl=={compat.RELEASES[-1]}" in capsys.readouterr().out


def test_no_text_tells_to_install_a_component_past_the_hint():
    """Texts name the command, so that what fits is written down once."""
    told = re.compile(
        r"pip install (?!-e \.|matplotlib|pyyaml|verl-fl-overlay|torch\b|--no-deps --no-build-isolation)['\w.>=-]"
    )
    found = {
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("verl_fl_overlay", "compat")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "install_hint.py"
        for line in file.read_text(encoding="utf-8").splitlines()
        if told.search(line)
    }
    assert found == set()
