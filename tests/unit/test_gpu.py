"""What runs on accelerators says what it ran, keeps what it has when it is cut, and says of the rest why it did not."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import gpu_page
import pytest
from gpu import Item

ROOT = Path(__file__).parents[2]
HERE = {
    "device": "Some Card 80GB",
    "cards": 1,
    "type": "cuda",
    "driver": "1.2",
    "versions": {"torch": "2.11.0"},
    "environment": {},
    "modules": ["verl", "pytest"],
}
SECOND = 1 / 60


def rows(folder: Path) -> dict[str, Any]:
    """Return how each item ended, by its name."""
    return json.loads((folder / gpu.RESULTS).read_text())["items"]


def test_without_an_accelerator_everything_is_not_run(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--folder", tmp_path]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("none-")
    found = rows(folder)
    assert list(found) == [item.name for item in gpu.ITEMS]
    assert {row["outcome"] for row in found.values()} == {"not run"}
    assert all(row["why"].startswith("no accelerator") for row in found.values())


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (Item("a", "true"), "passed"),
        (Item("a", "true", needs=("vllm", "verl")), "not run: needs vllm"),
        (Item("a", "true", cards=2), "not run: needs 2 accelerators, and 1 is here"),
        (Item("a", "true", minutes=5), "not run: no time left: it takes about 5 minutes"),
        (Item("a", "exit 3"), "failed: ended with exit status 3"),
        (Item("a", "sleep 100", minutes=SECOND / 3), "failed: had not ended after 1 s"),
        (Item("a", """echo '{{"x": [{{"error": "OOM"}}]}}' > {json}"""), "passed: 1 of its parts had an error"),
        (Item("a", """echo '{{"x": ' > {json}"""), "passed: 1 of its parts had an error"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.command,
)
def test_an_item_ends_as_it_is_told(item: Item, said: str, tmp_path: Path) -> None:
    status = gpu.run([item], HERE, tmp_path, minutes=4, keep=False)
    assert gpu.words(rows(tmp_path)["a"]) == said
    assert status == int(not said.startswith("passed"))


def test_another_kind_of_device_runs_only_what_is_not_for_cuda_alone(tmp_path: Path) -> None:
    items = [Item("a", "true"), Item("b", "true", cuda=False)]
    assert gpu.run(items, {**HERE, "type": "npu"}, tmp_path, 4, keep=False) == 0
    assert rows(tmp_path)["a"]["why"] == "is written for a CUDA device, and npu is here"
    assert rows(tmp_path)["b"]["outcome"] == "passed"


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0", "failed: 1 tests failed; 1 passed, 1 failed"),
        ("import pytest\npytest.importorskip('no.such', reason='needs it')", "not run: needs it; 1 skipped"),
        (
            "import pytest\n@pytest.mark.skip(reason='not run: needs it')\ndef test_a(): pass",
            "not run: needs it; 1 skipped",
        ),
        ("import no_such_module", "failed: 1 tests failed; 1 failed"),
    ],
)
def test_tests_are_counted_and_a_file_that_only_skips_is_not_run(tests: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(tests)
    item = Item("a", f"{{python}} -m pytest -c /dev/null --rootdir {tmp_path} {file} --junitxml={{junit}}")
    gpu.run([item], HERE, tmp_path, minutes=4, keep=False)
    assert gpu.words(rows(tmp_path)["a"]) == said


def test_what_is_cut_is_told_and_run_again_and_what_ended_is_kept(tmp_path: Path) -> None:
    ran, slow = tmp_path / "ran", tmp_path / "slow"
    slow.touch()
    items = [
        Item("a", f"echo a >> {ran}", SECOND),
        Item("b", f"echo '{{{{\"half\": 1}}}}' > {{json}}; test -e {slow} && sleep 100; echo b >> {ran}", 2 * SECOND),
        Item("c", f"echo c >> {ran}"),
    ]
    gpu.run(items, HERE, tmp_path, minutes=4 * SECOND, keep=True)
    found = rows(tmp_path)
    assert [row["outcome"] for row in found.values()] == ["passed", "not run", "not run"]
    assert re.fullmatch("no time left: cut after [34] s", found["b"]["why"])
    assert json.loads((tmp_path / found["b"]["json"]).read_text()) == {"half": 1}
    slow.unlink()
    assert gpu.run(items, HERE, tmp_path, minutes=4, keep=True) == 0
    assert ran.read_text().split() == ["a", "b", "c"], "the first one was not run again"


def test_tests_that_failed_before_the_rest_was_cut_are_not_lost(tmp_path: Path) -> None:
    failed = '<testcase classname="tests.gpu.test_x" name="b"><failure/></testcase>'
    case = '<testcase classname="tests.gpu.test_x" name="a"/>'
    for name, cases in {"fails": case + failed, "passes": case}.items():
        (tmp_path / f"{name}.xml").write_text(f"<testsuite>{cases}</testsuite>")
    cut = {name: gpu.words(gpu.outcome(None, tmp_path / name, "cut after 5 s", 5)) for name in ("fails", "passes")}
    assert cut == {
        "fails": "failed: 1 tests failed, cut after 5 s; 1 passed, 1 failed",
        "passes": "not run: cut after 5 s; 1 passed",
    }


def test_what_cannot_run_again_keeps_its_result(tmp_path: Path) -> None:
    item = Item("a", "true", minutes=2)
    gpu.run([item], HERE, tmp_path, minutes=4, keep=False)
    gpu.run([item], HERE, tmp_path, minutes=1, keep=False)
    assert rows(tmp_path)["a"]["outcome"] == "passed"


def test_a_run_that_is_ended_says_what_ran_and_leaves_no_process(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu
import gpu_page
from pathlib import Path
gpu.ITEMS = (gpu.Item("a", "true"), gpu.Item("b", "echo $$ > {tmp_path}/pid; kill $PPID; sleep 100"))
gpu.ask = lambda: {HERE!r}
sys.argv[1:] = ["--folder", {str(tmp_path)!r}]
sys.exit(gpu.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    (folder,) = tmp_path.glob("some-card-80gb-*")
    assert gpu.words(rows(folder)["a"]) == "passed"
    assert re.fullmatch(r"not run: the run was ended after \d+ s of it", gpu.words(rows(folder)["b"]))
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_what_an_item_leaves_behind_is_ended(tmp_path: Path) -> None:
    gpu.run([Item("a", f"sleep 100 & echo $! > {tmp_path}/pid")], HERE, tmp_path, 4, keep=False)
    left = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
    assert not left.exists() or not left.read_bytes(), "a process that has ended has no command line"


def test_results_of_two_environments_are_not_put_together(tmp_path: Path) -> None:
    gpu.run([Item("a", "true")], HERE, tmp_path, 4, keep=False)
    with pytest.raises(SystemExit, match=r"is of versions .*2\.11\.0.*and here is .*2\.12\.0"):
        gpu.run([Item("a", "true")], {**HERE, "versions": {"torch": "2.12.0"}}, tmp_path, 4, keep=True)


def test_going_on_takes_the_newest_results_of_this_card(tmp_path: Path) -> None:
    for name in ("some-card-80gb-2026-01-01", "some-card-80gb-2026-01-02", "2x-some-card-80gb-2026-01-03"):
        (tmp_path / name).mkdir()
    assert gpu.folder_of(HERE, tmp_path, keep=True).name == "some-card-80gb-2026-01-02"
    assert gpu.folder_of({**HERE, "cards": 2}, tmp_path, keep=True).name == "2x-some-card-80gb-2026-01-03"
    assert gpu.folder_of(HERE, tmp_path, keep=False).name > "some-card-80gb-2026-01-02"


def test_items_are_chosen_by_name() -> None:
    assert [item.name for item in gpu.chosen("head,doctor")] == ["doctor", "head"]
    assert {item.name for item in gpu.chosen("tests")} == {f"tests/gpu/{f.name}" for f in ROOT.glob("tests/gpu/test_*")}
    with pytest.raises(SystemExit, match="there is no nothing; there are: tests, doctor"):
        gpu.chosen("nothing,head")


def test_every_benchmark_with_a_gpu_form_is_an_item_and_has_the_options_that_it_is_given() -> None:
    files = {file.name for file in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser(" in file.read_text()}
    files -= {"check.py"}  # which is about the CPU
    named = {}
    for item in gpu.ITEMS:
        names = re.findall(r"benchmarks/(\w+\.py)", item.command)
        named |= dict.fromkeys(names, item)
        text = "".join((ROOT / "benchmarks" / name).read_text(encoding="utf-8") for name in names)
        options = re.findall(r" (--[a-z-]+)", item.command) if names else []
        assert not [option for option in options if f'"{option}"' not in text], item.name
    assert named.keys() == files


def test_the_page_is_that_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_page.py", "--check"], cwd="/", check=False)
    assert done.returncode == 0, "run: python tools/gpu_page.py"


def test_the_page_tells_of_each_card_what_ran_there_and_of_the_rest_that_it_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = (Item("a", "true"), Item("b", "exit 1"), Item("c", "true", needs=("vllm",)), Item("new", "true"))
    monkeypatch.setattr(gpu_page, "ITEMS", items)
    kept = tmp_path / "kept"
    kept.mkdir()
    assert re.findall(r"`(\w+)` \| (.*) \|", gpu_page.made(kept)) == [(item.name, "not run") for item in items]
    monkeypatch.setattr(gpu, "commit", lambda: "1a2b3c")
    gpu.run([*items[:3]], HERE, tmp_path / "gpu" / "some-card-2026-01-02", 4, keep=False)
    gpu.run([*items[:3]], {**HERE, "cards": 0, "device": ""}, tmp_path / "gpu" / "none-2026-01-02", 4, keep=False)
    gpu_page.copied(tmp_path / "gpu", kept)
    assert [file.name for file in kept.iterdir()] == ["gpu-some-card-2026-01-02.json"], "a machine without a card"
    page = gpu_page.made(kept)
    assert re.findall(r"`(\w+)` \| (.*) \|", page) == [
        ("a", "passed"),
        ("b", "failed: ended with exit status 1"),
        ("c", "not run: needs vllm"),
        ("new", "not run"),
    ]
    assert "| 1.2 | 1a2b3c | torch 2.11.0 |" in page


def test_in_a_bundle_the_commit_is_the_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"commit": "1a2b3c4d5e6f"}))
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "repository")
    assert gpu.commit() == "1a2b3c4"


def test_a_clone_beside_another_manifest_and_an_sdist_in_another_clone_have_no_commit_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"files": []}))
    (tmp_path / "clone" / "sdist").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path / "clone"), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "one"], check=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "clone")
    assert re.fullmatch("[0-9a-f]{7,}", gpu.commit())
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "clone" / "sdist")
    assert gpu.commit() == ""


def _without_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "a file system has none")


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask", lambda: {**HERE, "lacking": "a test"})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--folder", str(tmp_path), "--only", "doctor"])
    folder = gpu.folder_of(HERE, tmp_path, keep=False)
    with gpu.locked(folder, ""), pytest.raises(SystemExit, match=r"is in use by another gpu\.py"):
        gpu.main()
    monkeypatch.setattr("locks.fcntl.flock", _without_locks)
    assert gpu.main() == 1
    assert rows(folder)["doctor"]["why"] == "a test"


def test_who_is_interrupted_while_it_asks_writes_nothing(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu
gpu.ask = lambda: os.kill(os.getpid(), signal.SIGINT) or {{**{HERE!r}, "lacking": "it cannot be loaded"}}
sys.argv[1:] = ["--folder", {str(tmp_path)!r}]
sys.exit(gpu.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert list(tmp_path.iterdir()) == []


def test_tests_that_share_a_run_are_in_one_group() -> None:
    """Else each of the processes that share the GPU would make that run."""
    files = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {name for name, text in files.items() if 'scope="module"' in text and "xdist_group(" not in text} == set()
